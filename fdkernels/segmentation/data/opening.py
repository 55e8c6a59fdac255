"""Open image files that may be corrupt, in another format, turned or too large."""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

LIMIT_VARIABLE = "FDKERNELS_MAX_IMAGE_PIXELS"
# Exceptions that Pillow raises on corrupt files; a corrupt PNG raises SyntaxError.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,  # a tile that claims gigabytes
    struct.error,
    zlib.error,
)
# Pillow reduces 16-bit colours to their high bytes. Read in the other byte order they are the low bytes;
# grey with alpha, which has no other order, is read as its four bytes.
_SWAPPED = "B" if sys.byteorder == "little" else "L"
_LOW_BYTES = {
    "RGB;16B": "RGB;16L",
    "RGBA;16B": "RGBA;16L",
    "LA;16B": "RGBA",
    "RGB;16N": f"RGB;16{_SWAPPED}",
    "RGBA;16N": f"RGBA;16{_SWAPPED}",
}


@cache
def apply_pixel_limit() -> None:
    """Set Pillow's limit against decompression bombs from the environment variable, if it is set.

    Raises:
        ValueError: the variable is not a positive whole number.
    """
    wanted = os.environ.get(LIMIT_VARIABLE)
    if wanted is None:
        return
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of pixels, 1 or more, got {wanted!r}")
    Image.MAX_IMAGE_PIXELS = int(wanted)


def too_large(path: Path, reason: object) -> ValueError:
    """Return the error for a file above Pillow's limit, which says how to raise it."""
    return ValueError(
        f"{path} cannot be read: {reason} If you trust the file, set the environment variable "
        f"{LIMIT_VARIABLE} (or PIL.Image.MAX_IMAGE_PIXELS) to the number of pixels you allow."
    )


def check_pixels(path: Path, pixels: int) -> None:
    """Apply Pillow's limit against decompression bombs to a file that Pillow does not decode.

    Raises:
        ValueError: the file has more pixels.
    """
    apply_pixel_limit()
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise too_large(
            path,
            f"Image size ({pixels} pixels) exceeds limit of {limit} pixels, could be decompression bomb.",
        )


@contextmanager
def opened(path: Path, *, low_bytes: bool = False) -> Iterator[Image.Image]:
    """Open and decode the image at `path`, a file of exactly one image, turned as its orientation tag says.

    Args:
        path: the file.
        low_bytes: decode the low bytes of 16-bit colours in place of the high ones; grey with alpha as
            its four bytes, in the bands of RGBA.

    Raises:
        ValueError: opening or decoding (also inside the block) fails, the image exceeds the pixel
            limit, or the file contains several images.
    """
    apply_pixel_limit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Pillow warns about corrupt metadata and dropped transparency; neither is used here.
            warnings.simplefilter("ignore", UserWarning)
            # Not by its name: Pillow would map the file and mix up the sides of a turned TIFF.
            with path.open("rb") as content, Image.open(content) as image:
                frames = getattr(image, "n_frames", 1)
                if frames == 1:
                    if low_bytes:
                        image.tile = [tile._replace(args=_low(tile.args)) for tile in image.tile]
                    if image.format != "TIFF":  # Pillow turns TIFF when it decodes it
                        ImageOps.exif_transpose(image, in_place=True)
                    yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(path, error) from error
    except _BROKEN as error:
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    if frames != 1:
        raise ValueError(f"{path} must contain one image, got {frames}")


def _low(args: tuple[Any, ...] | str | None) -> tuple[Any, ...] | str:
    """Return the decoder's arguments, the first of which says how pixels are packed, for the low bytes."""
    if isinstance(args, tuple):
        return (_LOW_BYTES[args[0]], *args[1:])
    return _LOW_BYTES[str(args)]


__all__ = ["LIMIT_VARIABLE", "apply_pixel_limit", "check_pixels", "opened", "too_large"]
