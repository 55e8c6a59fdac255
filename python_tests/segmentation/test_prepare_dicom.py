"""DICOM frames decoded to 8-bit images, against the formulas of the standard."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    MPEG2MPML,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from fdkernels.segmentation.data.prepare import dataset
from fdkernels.segmentation.data.prepare.dicom import DicomFile
from made_dicom import region, tissue, write_dicom

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def picture(tmp_path, pixels, *args, frame=1, **tags):
    return DicomFile(write_dicom(tmp_path / "x.dcm", pixels, *args, **tags)).picture(frame)


def test_8_bit_grey_is_kept(tmp_path):
    assert np.array_equal(picture(tmp_path, GREY), GREY)


def test_monochrome1_is_inverted(tmp_path):
    assert np.array_equal(picture(tmp_path, GREY, "MONOCHROME1"), 255 - GREY)


def test_fewer_stored_bits_fill_the_range(tmp_path):
    got = picture(tmp_path, np.array([[0, 15, 8]], np.uint8), BitsStored=4, HighBit=3)
    assert got.tolist() == [[0, 255, 136]]  # 8 / 15 * 255


def test_16_bit_without_a_window_is_stretched(tmp_path):
    got = picture(tmp_path, np.array([[100, 1100, 350]], np.uint16), BitsStored=12, HighBit=11)
    assert got.tolist() == [[0, 255, 64]]  # 250 / 1000 * 255 = 63.75


def test_signed_values_are_stretched(tmp_path):
    assert picture(tmp_path, np.array([[-10, 10, 0]], np.int16)).tolist() == [[0, 255, 128]]


def test_a_constant_frame_of_16_bits_is_black(tmp_path):
    assert not picture(tmp_path, np.full((2, 2), 700, np.uint16)).any()


def test_a_linear_window_follows_the_standard(tmp_path):
    """C.11.2.1.2.1: ((x - (c - 1/2)) / (w - 1) + 1/2) of the range, clipped at both ends."""
    values = np.array([[0, 999, 1000, 1500, 1999, 2001, 4095]], np.uint16)
    got = picture(
        tmp_path, values, BitsStored=12, HighBit=11, WindowCenter=1500, WindowWidth=1001, RescaleSlope=1,
        RescaleIntercept=0,
    )  # fmt: skip
    share = ((values - 1499.5) / 1000 + 0.5).clip(0, 1)
    assert np.array_equal(got, np.rint(share * 255))


def test_the_window_applies_to_rescaled_values(tmp_path):
    values = np.array([[0, 10, 20, 30]], np.uint8)
    got = picture(tmp_path, values, WindowCenter=-70.5, WindowWidth=42, RescaleSlope=2, RescaleIntercept=-100)
    share = ((values * 2.0 - 100 + 71) / 41 + 0.5).clip(0, 1)
    assert np.array_equal(got, np.rint(share * 255))


def test_a_sigmoid_window_follows_the_standard(tmp_path):
    """C.11.2.1.3.1: 1 / (1 + exp(-4 (x - c) / w)) of the range."""
    values = np.array([[0, 100, 128, 160, 255]], np.uint8)
    got = picture(tmp_path, values, WindowCenter=128, WindowWidth=64, VOILUTFunction="SIGMOID")
    assert np.array_equal(got, np.rint(255 / (1 + np.exp(-4 * (values - 128.0) / 64))))


def test_the_first_of_several_windows_counts(tmp_path):
    values = np.array([[0, 50, 99, 200]], np.uint8)
    got = picture(tmp_path, values, WindowCenter=[50, 150], WindowWidth=[100, 10])
    assert np.array_equal(got, np.rint(((values - 49.5) / 99 + 0.5).clip(0, 1) * 255))


def test_a_window_of_monochrome1_is_inverted_last(tmp_path):
    values = np.array([[0, 50, 99, 200]], np.uint8)
    plain = picture(tmp_path, values, WindowCenter=50, WindowWidth=100)
    assert np.array_equal(
        picture(tmp_path, values, "MONOCHROME1", WindowCenter=50, WindowWidth=100), 255 - plain
    )


def test_a_value_of_interest_table_is_looked_up(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4, 2, 8]
    table.LUTData = np.array([0, 100, 200, 250], "<u2").tobytes()
    got = picture(tmp_path, np.array([[0, 2, 3, 4, 5, 9]], np.uint8), VOILUTSequence=[table])
    assert got.tolist() == [[0, 0, 100, 200, 250, 250]]


def test_rgb_is_kept_and_equal_channels_become_grey(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(picture(tmp_path, rgb, "RGB"), rgb)
    assert np.array_equal(picture(tmp_path, np.repeat(GREY[..., None], 3, 2), "RGB"), GREY)


def test_planes_of_rgb_are_put_together(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    stored = np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(4, 6, 3)
    assert np.array_equal(picture(tmp_path, stored, "RGB", PlanarConfiguration=1), rgb)


def test_16_bit_rgb_is_scaled(tmp_path):
    rgb = np.array([[[0, 257, 65535]]], np.uint16)
    assert picture(tmp_path, rgb, "RGB").tolist() == [[[0, 1, 255]]]


def test_ybr_full_becomes_rgb(tmp_path):
    """C.7.6.3.1.2, inverted: R = Y + 1.402 (Cr - 128) and so on."""
    y, b, r = 120.0, 110.0, 150.0
    got = picture(tmp_path, np.full((2, 2, 3), (y, b, r), np.uint8), "YBR_FULL")
    rgb = (y + 1.402 * (r - 128), y - 0.344136 * (b - 128) - 0.714136 * (r - 128), y + 1.772 * (b - 128))
    assert np.abs(got - np.array(rgb)).max() <= 1


def test_grey_ybr_is_grey(tmp_path):
    stored = np.stack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)], 2)
    assert np.array_equal(picture(tmp_path, stored, "YBR_FULL"), GREY)


def test_a_palette_is_looked_up(tmp_path):
    tables = {}
    for colour, entries in (("Red", [0, 10, 20]), ("Green", [5, 15, 25]), ("Blue", [0, 200, 255])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = (257 * np.array(entries, "<u2")).tobytes()
    got = picture(tmp_path, np.array([[0, 1, 2]], np.uint8), "PALETTE COLOR", **tables)
    assert got.tolist() == [[[0, 5, 0], [10, 15, 200], [20, 25, 255]]]


def palette_tags(entries, bits=16, words=True, big=False):
    """Descriptors and data of a grey palette, stored in words or in bytes packed into words."""
    order = ">u2" if big else "<u2"
    values = np.array(entries)
    packed = values if words else values.astype(np.uint8).view("<u2")
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [len(entries), 0, bits]
        tags[f"{colour}PaletteColorLookupTableData"] = packed.astype(order).tobytes()
    return tags


@pytest.mark.parametrize("big", [False, True], ids=["little endian", "big endian"])
@pytest.mark.parametrize(
    ("scale", "bits", "words"),
    [(257, 16, True), (256, 16, True), (1, 16, True), (1, 8, True), (1, 8, False)],
    ids=["16 bits", "high bytes", "8-bit values in 16 bits", "8 bits in words", "8 bits packed"],
)
def test_a_palette_is_read_however_it_is_stored(tmp_path, scale, bits, words, big):
    values = np.array([[0, 1, 100, 255]], np.uint8)
    tags = palette_tags(np.arange(256) * scale, bits, words, big)
    syntax = ExplicitVRBigEndian if big else ExplicitVRLittleEndian
    got = picture(tmp_path, values, "PALETTE COLOR", syntax=syntax, **tags)
    assert np.abs(got.astype(int) - values).max() <= 1


def test_a_palette_of_more_than_256_bytes_does_not_wrap(tmp_path):
    entries = np.arange(512) // 2
    got = picture(
        tmp_path,
        np.array([[0, 300, 511, 900]], np.uint16),
        "PALETTE COLOR",
        **palette_tags(entries, 8, False),
    )
    assert got.tolist() == [[0, 150, 255, 255]]


@pytest.mark.parametrize("colour", ["Red", "Green", "Blue"])
def test_a_palette_that_is_empty_or_short_is_named(tmp_path, colour):
    tags = palette_tags(np.arange(256))
    values = np.array([[0, 1]], np.uint8)
    for data, said in (
        (b"", "Palette Color Lookup Table Data, which is missing"),
        (b"ab", "must have the 256"),
    ):
        with pytest.raises(ValueError, match=said):
            picture(
                tmp_path, values, "PALETTE COLOR",
                **{**tags, f"{colour}PaletteColorLookupTableData": data},
            )  # fmt: skip
    with pytest.raises(ValueError, match="needs a Red Palette Color Lookup Table Descriptor"):
        picture(tmp_path, values, "PALETTE COLOR", **{**tags, "RedPaletteColorLookupTableDescriptor": None})


def test_8_bit_colours_in_16_bits_are_not_black(tmp_path):
    rgb = np.array([[[0, 100, 255]]], np.uint16)
    assert picture(tmp_path, rgb, "RGB").tolist() == [[[0, 100, 255]]]


EMPTY = {
    "slope": {"RescaleSlope": None, "RescaleIntercept": 0},
    "intercept": {"RescaleSlope": 1, "RescaleIntercept": None},
    "both": {"RescaleSlope": None, "RescaleIntercept": None},
    "window": {"WindowCenter": None, "WindowWidth": None},
    "width": {"WindowCenter": 128, "WindowWidth": None},
    "centre": {"WindowCenter": None, "WindowWidth": 256},
    "function": {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": ""},
    "tables": {"VOILUTSequence": [], "ModalityLUTSequence": []},
    "frames": {"NumberOfFrames": None},
    "bits stored": {"BitsStored": None},
    "aspect": {"PixelAspectRatio": None, "PlanarConfiguration": None, "SmallestImagePixelValue": None},
    "regions": {"SequenceOfUltrasoundRegions": []},
    "identity": {"PatientID": None, "BurnedInAnnotation": None},
}


@pytest.mark.parametrize("what", EMPTY)
def test_an_empty_element_counts_as_absent(tmp_path, what):
    file = DicomFile(write_dicom(tmp_path / "x.dcm", GREY, **EMPTY[what]))
    assert np.abs(file.picture(1).astype(int) - GREY).max() <= 1
    assert (file.frames, file.says_annotated, file.regions(4, 3)) == (1, False, None)


def test_an_empty_slope_leaves_the_intercept_and_an_empty_item_the_window(tmp_path):
    values = np.array([[0, 50, 99, 200]], np.uint8)
    plain = picture(tmp_path, values, WindowCenter=50, WindowWidth=100)
    shifted = picture(
        tmp_path, values, WindowCenter=40, WindowWidth=100, RescaleIntercept=-10, RescaleSlope=None
    )
    assert np.array_equal(shifted, plain)
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 2, 8], None
    assert np.array_equal(
        picture(tmp_path, values, WindowCenter=50, WindowWidth=100, VOILUTSequence=[table]), plain
    )


def test_a_text_of_blanks_and_the_first_of_two_windows_may_be_empty(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", GREY, WindowCenter=[50, 60], WindowWidth=[100, 90], PatientID="AB")
    whole = path.read_bytes()
    assert whole.count(b"50.0\\60.0") == whole.count(b"AB") == 1
    path.write_bytes(whole.replace(b"50.0\\60.0", b"    \\60.0").replace(b"AB", b"  "))
    file = DicomFile(path)
    assert file.text("PatientID") == ""
    expected = picture(tmp_path, GREY, WindowCenter=60, WindowWidth=90)
    assert np.array_equal(file.picture(1), expected)


def test_a_region_with_an_empty_corner_does_not_count(tmp_path):
    torn = region((2, 3, 20, 25))
    torn.RegionLocationMaxX1 = None
    assert regions(tmp_path, torn, region((1, 1, 4, 4))) == [(1, 1, 4, 4)]


def test_a_negative_slope_inverts(tmp_path):
    got = picture(tmp_path, GREY, RescaleSlope=-1, RescaleIntercept=255)
    assert np.array_equal(got, 255 - GREY)


def jpeg(picture, strip=True, names=None, **options):
    """Encode RGB [H, W, 3]; leave out the JFIF and Adobe markers, and rename the components."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=98, **options)
    stream, at, kept = buffer.getvalue(), 2, b"\xff\xd8"
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = bytearray(stream[at:end])
        if names and segment[1] == 0xC0:
            segment[10], segment[13], segment[16] = names
        if not (strip and segment[1] in (0xE0, 0xEE)):
            kept += segment
        at = end
    scan = bytearray(stream[at:])
    if names:
        scan[5], scan[7], scan[9] = names
    return kept + bytes(scan)


def jpeg_file(tmp_path, stream, kind, height, width):
    data = dcmread(write_dicom(tmp_path / "raw.dcm", np.zeros((height, width, 3), np.uint8), "RGB"))
    data.PhotometricInterpretation = kind
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = encapsulate([stream])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "jpeg.dcm")
    return DicomFile(tmp_path / "jpeg.dcm")


STREAMS = {
    "YCbCr, JFIF": {"strip": False},
    "YCbCr, no marker": {"subsampling": 0},
    "YCbCr, chroma at half size": {"subsampling": 2, "qtables": [[8] * 64]},
    "YCbCr, nothing to tell by": {"subsampling": 0, "qtables": [[8] * 64]},
    "RGB, Adobe": {"strip": False, "keep_rgb": True},
    "RGB, by the names of its components": {"keep_rgb": True},
    "RGB, nothing to tell by": {"keep_rgb": True, "names": (1, 2, 3), "qtables": [[8] * 64]},
}


@pytest.mark.parametrize("kind", ["RGB", "YBR_FULL_422", "YBR_FULL"])
@pytest.mark.parametrize("case", STREAMS)
def test_the_colours_of_a_jpeg_are_those_of_its_stream_whatever_the_tag(tmp_path, case, kind):
    grey = tissue(32, 48)
    colours = np.repeat(grey[..., None], 3, 2)
    colours[4:12, 4:12] = (200, 60, 40)  # a mark that must keep its colour
    got = jpeg_file(tmp_path, jpeg(colours, **STREAMS[case]), kind, 32, 48).picture(1)
    assert np.abs(got[6:10, 6:10].astype(int) - (200, 60, 40)).max() <= 24
    assert np.abs(got[16:].astype(int) - grey[16:, :, None]).max() <= 16


def test_a_jpeg_of_another_size_than_the_file_says_is_named(tmp_path):
    file = jpeg_file(tmp_path, jpeg(np.zeros((16, 24, 3), np.uint8)), "RGB", 32, 48)
    with pytest.raises(ValueError, match="must have the 48x32 pixels that Rows and Columns say, got 24x16"):
        file.picture(1)


@pytest.mark.parametrize(("kind", "other"), [("RGB", "YBR_FULL"), ("YBR_FULL", "RGB")])
def test_a_tag_that_uncompressed_values_contradict_is_refused(tmp_path, kind, other):
    grey = tissue(32, 48)
    neutral = grey if kind == "YBR_FULL" else np.full_like(grey, 128)
    with pytest.raises(ValueError, match=rf"Photometric Interpretation says {kind}, .* taken as {other}"):
        picture(tmp_path, np.stack([grey, neutral, neutral], 2), kind)


def test_a_kind_of_colours_that_is_not_supported_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Photometric Interpretation must be RGB, .* got HSV"):
        picture(tmp_path, np.zeros((4, 6, 3), np.uint8), "HSV")


def test_what_a_decoder_said_is_in_the_sentence_with_the_package_to_try(tmp_path):
    data = dcmread(write_dicom(tmp_path / "x.dcm", GREY))
    data.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.save_as(tmp_path / "y.dcm")
    with pytest.raises(ValueError, match=r"y\.dcm cannot be read") as caught:
        DicomFile(tmp_path / "y.dcm").picture(1)
    said = str(caught.value)
    assert "\n" not in said
    assert "pillow: " in said
    assert said.endswith(("pip install pylibjpeg pylibjpeg-libjpeg", "pip install python-gdcm"))


def test_each_frame_is_its_own(tmp_path):
    frames = np.stack([GREY, GREY + 1, GREY + 2])
    for number in (1, 2, 3):
        assert np.array_equal(picture(tmp_path, frames, frames=3, frame=number), GREY + number - 1)
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    assert np.array_equal(picture(tmp_path, colours, "RGB", frames=2, frame=2), colours[1])


@pytest.mark.parametrize("frame", [0, 3])
def test_a_missing_frame_is_rejected(tmp_path, frame):
    with pytest.raises(ValueError, match=rf"x\.dcm has frames 1 to 2, got frame {frame}"):
        picture(tmp_path, np.stack([GREY, GREY]), frames=2, frame=frame)


def test_big_endian_words_are_byte_swapped(tmp_path):
    values = np.array([[0, 300, 1000]], ">u2")
    path = tmp_path / "x.dcm"
    write_dicom(path, values, syntax=ExplicitVRBigEndian)
    assert DicomFile(path).picture(1).tolist() == [[0, 76, 255]]


def test_jpeg_and_rle_need_no_other_package(tmp_path):
    grey = tissue(32, 48)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=95)
    path = write_dicom(tmp_path / "x.dcm", grey)
    data = dcmread(path)
    data.PixelData = encapsulate([stream.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.save_as(tmp_path / "jpeg.dcm")
    assert np.abs(DicomFile(tmp_path / "jpeg.dcm").picture(1).astype(int) - grey).max() <= 6
    data = dcmread(path)
    data.compress(RLELossless)
    data.save_as(tmp_path / "rle.dcm")
    assert np.array_equal(DicomFile(tmp_path / "rle.dcm").picture(1), grey)


@pytest.mark.parametrize(
    ("syntax", "said"),
    [
        (
            JPEGLosslessSV1,
            r"compressed as JPEG Lossless, .*\(1\.2\.840\.10008\.1\.2\.4\.70\).*pip install pylibjpeg",
        ),
        (JPEGLSLossless, r"compressed as JPEG-LS .*\(1\.2\.840\.10008\.1\.2\.4\.80\).*pip install pyjpegls"),
        (MPEG2MPML, r"compressed as MPEG2 .*\.4\.100\), for which pydicom has no decoder"),
    ],
)
def test_a_missing_decoder_is_named(tmp_path, monkeypatch, syntax, said):
    """Hides the plugins, so the test also works where the decoder is installed."""
    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    data = dcmread(write_dicom(tmp_path / "x.dcm", GREY))
    data.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(tmp_path / "y.dcm")
    with pytest.raises(ValueError, match=said):
        DicomFile(tmp_path / "y.dcm")


@pytest.mark.parametrize("syntax", ["1.2.3.4", "1.2.840.113619.5.2"], ids=["unknown", "private"])
def test_a_non_standard_transfer_syntax_is_rejected(tmp_path, syntax):
    path = write_dicom(tmp_path / "x.dcm", GREY)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0")))
    with pytest.raises(ValueError, match=r"x\.dcm (cannot be read|is compressed as)"):
        DicomFile(path).picture(1)


def test_broken_and_empty_files_are_named(tmp_path):
    whole = write_dicom(tmp_path / "whole.dcm", GREY).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=r"cut\.dcm cannot be read"):
        DicomFile(tmp_path / "cut.dcm").picture(1)
    (tmp_path / "text.dcm").write_text("not DICOM")
    with pytest.raises(ValueError, match=r"text\.dcm cannot be read"):
        DicomFile(tmp_path / "text.dcm")
    data = dcmread(tmp_path / "whole.dcm")
    del data.PixelData
    data.save_as(tmp_path / "report.dcm")
    with pytest.raises(ValueError, match=r"report\.dcm contains no image"):
        DicomFile(tmp_path / "report.dcm")


def test_a_frame_beyond_the_limit_against_bombs_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(ValueError, match=r"x\.dcm must have at most 11 pixels per frame, got 4x3"):
        picture(tmp_path, GREY)


def regions(tmp_path, *items):
    return DicomFile(write_dicom(tmp_path / "x.dcm", GREY, regions=list(items))).regions(40, 30)


def test_regions_end_with_their_last_pixel_and_inside_the_frame(tmp_path):
    assert DicomFile(write_dicom(tmp_path / "x.dcm", GREY)).regions(40, 30) is None
    assert regions(tmp_path, region((2, 3, 20, 25))) == [(2, 3, 20, 25)]
    assert regions(tmp_path, region((2, 3, 100, 99)), region((0, 0, 5, 5))) == [(2, 3, 40, 30), (0, 0, 5, 5)]


def test_regions_of_other_kinds_do_not_count(tmp_path):
    colour, m_mode = region((0, 0, 9, 9), data_type=2), region((0, 0, 9, 9), spatial_format=2)
    assert regions(tmp_path, colour, m_mode, region((1, 1, 4, 4))) == [(1, 1, 4, 4)]
    for kinds in ([m_mode], [colour], [region((50, 50, 60, 60))]):
        with pytest.raises(ValueError, match="no two-dimensional tissue region inside its 40x30 pixels"):
            regions(tmp_path, *kinds)


@pytest.mark.parametrize(("value", "annotated"), [("YES", True), ("NO", False), (None, False)])
def test_the_tag_says_whether_text_is_burned_in(tmp_path, value, annotated):
    tags = {} if value is None else {"BurnedInAnnotation": value}
    assert DicomFile(write_dicom(tmp_path / "x.dcm", GREY, **tags)).says_annotated is annotated


def test_an_element_that_claims_gigabytes_is_named(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "US1.dcm", GREY)

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(dataset, "dcmread", no_memory)
    with pytest.raises(ValueError, match=r"US1\.dcm cannot be read: MemoryError"):
        DicomFile(path)
