"""Which colours the three samples of a pixel are: what the compressed stream says, and then the tag."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.processing import convert_color_space
from pydicom.pixels.utils import as_pixel_options, iter_pixels
from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)

_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit)
_JPEG_2000 = (JPEG2000, JPEG2000Lossless)

# Markers of a JPEG stream: start of image, JFIF, Adobe, start of scan; frames of all codings.
_SOI, _APP0, _APP14, _SOS = 0xD8, 0xE0, 0xEE, 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
# Markers without a length: restarts and temporary.
_BARE = frozenset({*range(0xD0, 0xD9), 0x01})

# Component identifiers "RGB" and "rgb", by which encoders without other markers name their colours.
_RGB_NAMES = ((82, 71, 66), (114, 103, 98))

# A pixel is grey where its channels differ, or its chroma from neutral, by no more than compression does.
_GREY_RGB = 16
_GREY_CHROMA = 8


def rgb_values(dataset: Dataset, frame: int) -> np.ndarray:
    """Decode a frame of three samples a pixel to RGB, [H, W, 3].

    Encoders and gateways often leave a wrong Photometric Interpretation. In a JPEG of 8 bits, the colours
    are those that the stream says: by an Adobe marker, by components named R, G and B, by a JFIF
    marker, by chroma that is sampled or quantised otherwise. Where it says nothing, they are those in
    which more of the picture is grey, as ultrasound is; and where neither is, those of the tag.
    JPEG 2000 says itself whether its components were transformed. All else has the tag alone, which is
    refused if the picture is grey under the other reading and not under its own.

    Args:
        dataset: the file, with Samples per Pixel 3.
        frame: number of the frame, counted from 1.

    Raises:
        ValueError: Photometric Interpretation is not supported or contradicts the values.
    """
    kind = str(dataset.get("PhotometricInterpretation") or "").upper()
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _JPEG:
        stream = _stream(dataset, frame)
        if _precision(stream) == 8:
            values = _decode_jpeg(stream, kind)
            _check_size(values, dataset)
            return values
    if syntax in _JPEG_2000 and _is_transformed(_stream(dataset, frame)):
        # The decoder undoes the codestream's own transform, so that no other may follow.
        dataset.PhotometricInterpretation = "YBR_ICT"
    elif not _says_itself(syntax):
        return _by_tag(next(iter_pixels(dataset, indices=[frame - 1], raw=True)), kind)
    decoded: np.ndarray = next(iter_pixels(dataset, indices=[frame - 1]))
    return decoded


def _says_itself(syntax: UID) -> bool:
    """Tell whether the decoder of a compression deals with its colours."""
    return bool(syntax.is_encapsulated and syntax != RLELossless)


def _by_tag(values: np.ndarray, kind: str) -> np.ndarray:
    """Convert raw samples [H, W, 3] to RGB as the tag says.

    Raises:
        ValueError: the tag is none that can be converted, or the values contradict it.
    """
    if kind not in ("RGB", "YBR_FULL", "YBR_FULL_422"):
        raise ValueError(
            "Photometric Interpretation must be RGB, YBR_FULL or YBR_FULL_422 for three samples a pixel "
            f"without JPEG compression, got {kind or 'none'}"
        )
    if values.dtype != np.uint8:
        if kind != "RGB":
            raise ValueError(
                f"Photometric Interpretation {kind} must have 8 bits a sample, got {values.dtype}"
            )
        return values
    is_ybr = kind != "RGB"
    if _looks_ybr(values) is (not is_ybr):
        raise ValueError(
            f"Photometric Interpretation says {kind}, but the picture is grey only if its values are "
            f"taken as {'RGB' if is_ybr else 'YBR_FULL'}; correct that tag"
        )
    converted: np.ndarray = convert_color_space(values, "YBR_FULL", "RGB") if is_ybr else values
    return converted


def _looks_ybr(raw: np.ndarray) -> bool | None:
    """Tell in which reading most of raw samples uint8 [H, W, 3] are grey; None if in neither."""
    as_rgb = float((np.ptp(raw, axis=2) <= _GREY_RGB).mean())
    chroma = raw[..., 1:].astype(np.int16) - 128  # [H, W, 2]
    as_ybr = float((np.abs(chroma) <= _GREY_CHROMA).all(axis=2).mean())
    if max(as_rgb, as_ybr) <= 0.5 or as_rgb == as_ybr:
        return None
    return as_ybr > as_rgb


def _stream(dataset: Dataset, frame: int) -> bytes:
    options = as_pixel_options(dataset)
    stream: bytes = get_frame(
        dataset.PixelData,
        frame - 1,
        number_of_frames=options["number_of_frames"],
        extended_offsets=options.get("extended_offsets"),
    )
    return stream


def _check_size(values: np.ndarray, dataset: Dataset) -> None:
    said = (int(dataset.Rows), int(dataset.Columns))
    if values.shape[:2] != said:
        raise ValueError(
            f"the JPEG stream must have the {said[1]}x{said[0]} pixels that Rows and Columns say, "
            f"got {values.shape[1]}x{values.shape[0]}"
        )


def _segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the segments before the first scan; the start is that of the marker.

    Raises:
        ValueError: the stream is no JPEG stream or ends within them.
    """
    if stream[:2] != bytes((0xFF, _SOI)):
        raise ValueError("the JPEG stream must begin with FF D8, got " + stream[:2].hex(" ").upper())
    at = 2
    while at + 4 <= len(stream):
        marker = stream[at + 1]
        if stream[at] != 0xFF:
            raise ValueError(f"the JPEG stream is corrupt at byte {at}")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _BARE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield marker, at, end
        if marker == _SOS:
            return
        at = end
    raise ValueError("the JPEG stream ends before its first scan")


def _precision(stream: bytes) -> int:
    """Return the bits of a sample, 0 if the stream has no frame."""
    return next((stream[at + 4] for marker, at, _ in _segments(stream) if marker in _FRAMES), 0)


def _is_ycbcr(stream: bytes) -> bool | None:
    """Tell whether a JPEG stream of three components says that they are YCbCr; None if it does not say."""
    jfif = False
    adobe: int | None = None
    components: list[tuple[int, int, int]] = []  # identifier, sampling factors, quantisation table
    for marker, at, end in _segments(stream):
        body = stream[at + 4 : end]
        if marker == _APP0 and body.startswith(b"JFIF\0"):
            jfif = True
        elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif marker in _FRAMES:
            components = [tuple(body[place : place + 3]) for place in range(6, len(body) - 2, 3)]  # type: ignore[misc]
    names, sampling, tables = zip(*components, strict=True) if components else ((), (), ())
    if names in _RGB_NAMES:
        return False
    if adobe in (0, 1):
        return adobe == 1
    if jfif or len(set(sampling)) > 1 or len(set(tables)) > 1:
        return True
    return None


def _decode_jpeg(stream: bytes, kind: str) -> np.ndarray:
    """Decode a JPEG stream to RGB, uint8 [H, W, 3]; `kind` is what the tag says of its colours."""
    is_ycbcr = _is_ycbcr(stream)
    if is_ycbcr is None:
        is_ycbcr = _looks_ybr(_decoded_as(stream, ycbcr=False))
    if is_ycbcr is None:
        is_ycbcr = "YBR" in kind
    return _decoded_as(stream, ycbcr=is_ycbcr)


def _decoded_as(stream: bytes, ycbcr: bool) -> np.ndarray:
    """Decode a JPEG stream, uint8 [H, W, 3], with its components taken as YCbCr, or as RGB.

    What says so is written into the stream, as an Adobe marker alone: the decoder has no option for it.
    """
    said = b"Adobe" + struct.pack(">HHHB", 100, 0, 0, int(ycbcr))
    parts = [bytes((0xFF, _SOI, 0xFF, _APP14)), struct.pack(">H", len(said) + 2), said]
    kept = 2
    for marker, at, end in _segments(stream):
        if marker in (_APP0, _APP14):
            parts.append(stream[kept:at])
            kept = end
    parts.append(stream[kept:])
    with Image.open(io.BytesIO(b"".join(parts)), formats=("JPEG",)) as image:
        return np.array(image.convert("RGB"))


def _is_transformed(stream: bytes) -> bool:
    """Tell whether a JPEG 2000 stream says that a transform of its components is to be undone.

    It is the fifth byte of the coding style default (ISO/IEC 15444-1, A.6.1) in the main header.
    """
    start = stream.find(b"\xff\x4f\xff\x51")  # start of codestream, image and tile size
    at = start + 2
    while start >= 0 and at + 4 <= len(stream) and stream[at : at + 2] != b"\xff\x90":  # start of a tile
        if stream[at : at + 2] == b"\xff\x52" and at + 8 < len(stream):
            return stream[at + 8] == 1
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return False


__all__ = ["rgb_values"]
