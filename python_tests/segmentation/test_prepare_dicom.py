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
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

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
