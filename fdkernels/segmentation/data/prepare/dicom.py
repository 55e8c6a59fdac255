"""Read DICOM files: frames as 8-bit images, and the tags that decide what to keep of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.pixels.utils import iter_pixels

from fdkernels.segmentation.data.prepare.options import Box
from fdkernels.segmentation.data.reading import LIMIT_VARIABLE, apply_pixel_limit

# Region Spatial Format (0018,6012) and Region Data Type (0018,6014) of a B-mode image.
_TWO_DIMENSIONAL = 1
_TISSUE = 1

# Packages that add decoders to pydicom, by the codec in the name of the transfer syntax.
_DECODERS = (
    ("High-Throughput JPEG 2000", "pylibjpeg pylibjpeg-openjpeg"),
    ("JPEG 2000", "pylibjpeg pylibjpeg-openjpeg"),
    ("JPEG-LS", "pyjpegls"),
    ("JPEG", "pylibjpeg pylibjpeg-libjpeg"),
)

# Exceptions that pydicom and its plugins raise on corrupt or unsupported data.
_DECODING_ERRORS = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert pydicom's exceptions for a corrupt or unsupported file to a ValueError that names it."""
    try:
        yield
    except _DECODING_ERRORS as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
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
            self._dataset = dcmread(path)
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
            package = next((names for codec, names in _DECODERS if codec in syntax.name), "gdcm")
            raise ValueError(f"{named}, which needs a decoder that is not installed: pip install {package}")

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
            # In DICOM the lower right corner is inclusive.
            corners = [
                Box(
                    int(region.RegionLocationMinX0),
                    int(region.RegionLocationMinY0),
                    int(region.RegionLocationMaxX1) + 1,
                    int(region.RegionLocationMaxY1) + 1,
                )
                for region in given
                if region.get("RegionSpatialFormat") == _TWO_DIMENSIONAL
                and region.get("RegionDataType") == _TISSUE
            ]
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
        frame. Inverts MONOCHROME1, so larger values are brighter.

        Raises:
            ValueError: the file has no such frame, or the frame cannot be decoded.
        """
        if not 1 <= frame <= self.frames:
            raise ValueError(f"{self.path} has frames 1 to {self.frames}, got frame {frame}")
        with _readable(self.path):
            values = next(iter_pixels(self._dataset, indices=[frame - 1]))  # [H, W] or [H, W, 3]
            kind = self._dataset.PhotometricInterpretation
            if kind == "PALETTE COLOR":
                colours = apply_color_lut(values, self._dataset)
                return _drop_equal_channels(_to_bytes(colours, 0, np.iinfo(colours.dtype).max))
            if values.ndim == 3:
                return _drop_equal_channels(_to_bytes(values, 0, 2 ** int(self._dataset.BitsStored) - 1))
            grey = _grey(values, self._dataset)
            return 255 - grey if kind == "MONOCHROME1" else grey


def _grey(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Map stored values [H, W] to uint8 [H, W] by the file's rescale and window."""
    rescaled = apply_modality_lut(values, dataset)
    shown = apply_voi_lut(rescaled, dataset)
    low: Any
    high: Any
    if dataset.get("VOILUTSequence"):
        low, high = 0, 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif dataset.get("WindowWidth") is not None and dataset.get("WindowCenter") is not None:
        with np.errstate(over="ignore"):  # exp overflows at the ends of a sigmoid
            low, high = apply_windowing(np.array([-1e12, 1e12]), dataset)
    elif values.dtype.kind == "u" and int(dataset.BitsStored) <= 8:
        shown, low, high = values, 0, 2 ** int(dataset.BitsStored) - 1
    else:
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
