"""Read DICOM files: frames as 8-bit images, and the tags that decide what to keep of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_rescale, apply_windowing
from pydicom.pixels.utils import iter_pixels

from fdkernels.segmentation.data.prepare.colours import rgb_values
from fdkernels.segmentation.data.prepare.dataset import read_dataset
from fdkernels.segmentation.data.prepare.options import Box
from fdkernels.segmentation.data.prepare.tables import grey_table, palette, white_of
from fdkernels.segmentation.data.reading import LIMIT_VARIABLE, apply_pixel_limit

# Region Spatial Format (0018,6012) and Region Data Type (0018,6014) of a B-mode image.
_TWO_DIMENSIONAL = 1
_TISSUE = 1

# Packages that add decoders to pydicom, by the codec in the name of the transfer syntax, and the name of
# pydicom's plugin that uses them.
_DECODERS = (
    ("High-Throughput JPEG 2000", "pylibjpeg pylibjpeg-openjpeg", "pylibjpeg"),
    ("JPEG 2000", "pylibjpeg pylibjpeg-openjpeg", "pylibjpeg"),
    ("JPEG-LS", "pyjpegls", "pyjpegls"),
    ("JPEG", "pylibjpeg pylibjpeg-libjpeg", "pylibjpeg"),
)
_LAST_RESORT = "python-gdcm"

_CORNERS = (
    "RegionLocationMinX0",
    "RegionLocationMinY0",
    "RegionLocationMaxX1",
    "RegionLocationMaxY1",
)

# Exceptions that pydicom and its plugins raise on corrupt or unsupported data.
_DECODING_ERRORS = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    MemoryError,  # an element that claims gigabytes
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


@contextmanager
def _readable(path: Path, remedy: Callable[[], str] = str) -> Iterator[None]:
    """Convert pydicom's exceptions for a corrupt or unsupported file to a ValueError that names it.

    Args:
        path: the file.
        remedy: makes what is to be said after the reason where a decoder failed.
    """
    try:
        yield
    except _DECODING_ERRORS as error:
        # pydicom lists what each decoder said on lines of its own.
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RuntimeError | OSError):  # of pydicom's decoders, and of Pillow
            reason += remedy()
        raise ValueError(f"{path} cannot be read: {reason}") from error


class DicomFile:
    """One DICOM file with pixel data.

    Args:
        path: the file.

    Attributes:
        path: the file.
        frames: number of frames.

    Raises:
        ValueError: the file cannot be read, has no pixel data, exceeds Pillow's limit against
            decompression bombs, or needs a decoder that is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path):
            self._dataset = read_dataset(path)
            has_pictures = "PixelData" in self._dataset
            rows, columns = int(self._dataset.get("Rows") or 0), int(self._dataset.get("Columns") or 0)
            self.frames = int(self._dataset.get("NumberOfFrames") or 1)
        if not has_pictures:
            raise ValueError(f"{path} contains no image: it has no Pixel Data")
        apply_pixel_limit()
        if Image.MAX_IMAGE_PIXELS is not None and rows * columns > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{path} must have at most {Image.MAX_IMAGE_PIXELS} pixels per frame, got {columns}x{rows}; "
                f"if you trust the file, raise the environment variable {LIMIT_VARIABLE}"
            )
        self._check_decoder()

    def _check_decoder(self) -> None:
        with _readable(self.path):
            syntax = self._dataset.file_meta.TransferSyntaxUID
            if not syntax.is_private and not syntax.is_encapsulated:
                return
        named = f"{self.path} is compressed as {syntax.name} ({syntax})"
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError as error:
            raise ValueError(
                f"{named}, for which pydicom has no decoder; export it uncompressed, or as JPEG or RLE"
            ) from error
        if not available:
            package = next((names for codec, names, _ in _DECODERS if codec in syntax.name), _LAST_RESORT)
            raise ValueError(f"{named}, which needs a decoder that is not installed: pip install {package}")

    def _remedy(self) -> str:
        """Name the package with another decoder for the file, where its compression has one."""
        syntax = self._dataset.file_meta.TransferSyntaxUID
        for codec, names, plugin in _DECODERS:
            if codec in syntax.name:
                tried = plugin in get_decoder(syntax).available_plugins
                return (
                    f"; if the file is whole, another decoder may read its {syntax.name}: "
                    f"pip install {_LAST_RESORT if tried else names}"
                )
        return ""

    def text(self, keyword: str) -> str:
        """Return the value of a tag as stripped text, empty if the tag is missing."""
        with _readable(self.path):
            return str(self._dataset.get(keyword) or "").strip()

    @property
    def says_annotated(self) -> bool:
        """True if Burned In Annotation (0028,0301) is YES."""
        return self.text("BurnedInAnnotation").upper() == "YES"

    def regions(self, width: int, height: int) -> list[Box] | None:
        """Return the two-dimensional tissue regions, clipped to a frame of that size in pixels.

        Returns None if the file has no Sequence of Ultrasound Regions (0018,6011).

        Raises:
            ValueError: the sequence contains no such region, or all of them are outside the frame.
        """
        with _readable(self.path):
            given = self._dataset.get("SequenceOfUltrasoundRegions")
            if not given:
                return None
            corners = []
            for region in given:
                kinds = (region.get("RegionSpatialFormat"), region.get("RegionDataType"))
                if kinds == (_TWO_DIMENSIONAL, _TISSUE) and all(name in region for name in _CORNERS):
                    x0, y0, x1, y1 = (int(region[name].value) for name in _CORNERS)
                    corners.append(Box(x0, y0, x1 + 1, y1 + 1))  # in DICOM the last corner is inclusive
        inside = [
            Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, width), min(box.y1, height)) for box in corners
        ]
        inside = [box for box in inside if box.area]
        if not inside:
            raise ValueError(
                f"{self.path} has no two-dimensional tissue region inside its {width}x{height} pixels; "
                "set the crop explicitly"
            )
        return inside

    def picture(self, frame: int) -> np.ndarray:
        """Decode frame `frame`, counted from 1, to uint8 [H, W], or [H, W, 3] (RGB) if it has colours.

        Applies the file's own grey-scale pipeline: rescale or modality table, then window or
        value-of-interest table, whose output range is mapped to 0 to 255. Without a window, values
        of up to 8 stored bits are scaled by their full range, others by the minimum and maximum of the
        frame. Inverts MONOCHROME1, so larger values are brighter. Tables and colours whose wider type
        holds 8-bit values are scaled by 255 (`white_of`); colours are those of `rgb_values`.

        Raises:
            ValueError: the file has no such frame, or the frame cannot be decoded.
        """
        if not 1 <= frame <= self.frames:
            raise ValueError(f"{self.path} has frames 1 to {self.frames}, got frame {frame}")
        with _readable(self.path, self._remedy):
            if int(self._dataset.get("SamplesPerPixel") or 1) > 1:
                colours = rgb_values(self._dataset, frame)  # [H, W, 3]
                bits = int(self._dataset.BitsStored)
                return _drop_equal_channels(_to_bytes(colours, 0, white_of(colours, bits)))
            values = next(iter_pixels(self._dataset, indices=[frame - 1]))  # [H, W]
        with _readable(self.path):
            kind = self._dataset.PhotometricInterpretation
            if kind == "PALETTE COLOR":
                table = palette(self._dataset)
                return _drop_equal_channels(_to_bytes(table(values), 0, table.white))
            grey = _grey(values, self._dataset)
            return 255 - grey if kind == "MONOCHROME1" else grey


def _grey(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Map stored values [H, W] to uint8 [H, W] by the file's rescale and window."""
    low: Any
    high: Any
    if "ModalityLUTSequence" in dataset:
        table = grey_table(dataset, "ModalityLUTSequence")
        shown, low, high = table(values), 0, table.white
    else:
        shown = apply_rescale(values, dataset)
        ends = np.array([0, 2 ** int(dataset.BitsStored) - 1], np.uint64)
        low, high = sorted(apply_rescale(ends, dataset))  # a negative slope inverts
    if "VOILUTSequence" in dataset:
        table = grey_table(dataset, "VOILUTSequence")
        shown, low, high = table(shown), 0, table.white
    elif "WindowWidth" in dataset:
        shown = apply_windowing(shown, dataset)
        with np.errstate(over="ignore"):  # exp overflows at the ends of a sigmoid
            low, high = apply_windowing(np.array([-1e12, 1e12]), dataset)
    elif values.dtype.kind != "u" or int(dataset.BitsStored) > 8:
        low, high = shown.min(), shown.max()
    return _to_bytes(shown, low, high)


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values from [`low`, `high`] to 0 to 255 and round to uint8."""
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    span = float(high) - float(low)
    if span == 0:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float64) - float(low)) * (255 / span)
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _drop_equal_channels(picture: np.ndarray) -> np.ndarray:
    """Reduce an RGB image [H, W, 3] to [H, W] if its channels are equal."""
    grey = picture[..., 0]
    if (picture == grey[..., None]).all():
        return np.ascontiguousarray(grey)
    return picture


__all__ = ["DicomFile"]
