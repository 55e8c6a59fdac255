"""Read images and masks from files that may be corrupt, in another format or too large."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fdkernels.segmentation.data.polygons import polygon_mask
from fdkernels.segmentation.data.samples import SegmentationSample

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
    struct.error,
    zlib.error,
)
_GREY = 0.2  # maximum number of mid-grey pixels, as a fraction of the foreground pixels


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


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open the image at `path`, a file of exactly one image.

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
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames == 1:
                    yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} cannot be read: {error} If you trust the file, set the environment variable "
            f"{LIMIT_VARIABLE} (or PIL.Image.MAX_IMAGE_PIXELS) to the number of pixels you allow."
        ) from error
    except _BROKEN as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if frames != 1:
        raise ValueError(f"{path} must contain one image, got {frames}")


def _is_16_bit(image: Image.Image) -> bool:
    """Return whether the image is 16-bit grey; older Pillow opens such a PNG in mode I."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def read_image(path: Path) -> Image.Image:
    """Read the image at `path` as 8-bit RGB.

    Drops an alpha channel, resolves a palette, repeats grey. Scales 16-bit grey by 255/65535 and
    rounds, whatever range the image uses, so that images stay comparable.

    Raises:
        ValueError: the file cannot be read, contains several images, exceeds Pillow's limit
            against decompression bombs, or has 32-bit or float pixels.
    """
    with opened(path) as image:
        if _is_16_bit(image):
            values = np.array(image).astype(np.uint32)  # [H, W]
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
        mode = image.mode
        colours = image.convert("RGB")
    if mode.startswith(("I", "F")):
        raise ValueError(f"{path} must have 8 or 16 bits a channel, got mode {mode}")
    return colours


def _foreground(values: np.ndarray, white: int, path: Path) -> np.ndarray:
    """Threshold grey `values` [H, W] to foreground, bool [H, W]; `white` is the maximum of their type."""
    eight_bits = values.dtype == np.uint8
    grey = np.flatnonzero(np.bincount(values.ravel())) if eight_bits else np.unique(values)
    if grey[0] < 0:
        raise ValueError(f"{path} must not contain values below 0, got {grey[0]}")
    if grey[grey > 0].size <= 1:
        return values > 0
    foreground: np.ndarray = values > white / 2
    middle = np.count_nonzero((values > white / 4) & (values < 3 * white / 4))
    if middle <= _GREY * np.count_nonzero(foreground) and foreground.any():
        return foreground
    raise ValueError(
        f"{path} must have 0 for background and one other value for foreground, or be nearly black "
        f"and white, got {grey.size} grey values between {grey[0]} and {grey[-1]}, with {middle} "
        f"mid-grey pixels and {np.count_nonzero(foreground)} pixels above half of white"
    )


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read the mask at `path` as bool [H, W], True in the foreground.

    If the image has 0 and one other value, non-zero is foreground. With more grey values, from lossy
    compression or anti-aliasing, the mask is thresholded at half of white, provided that the result
    is unambiguous: the pixels between a quarter and three quarters of white must be at most a fifth
    of those above the threshold. Colours are converted to luminance; an alpha channel is ignored.

    Args:
        path: an image, or an ImageScope `.xml` with polygons.
        size: width and height in pixels; required for polygons, whose file does not contain it.

    Raises:
        ValueError: the file cannot be read, its grey values are ambiguous, or `size` is missing for
            polygons.
    """
    if path.suffix.lower() == ".xml":
        if size is None:
            raise ValueError(f"size must be given for the polygons in {path}, got None")
        return polygon_mask(path, size)
    with opened(path) as image:
        mode = image.mode
        if mode.startswith("I"):
            white = 65535 if _is_16_bit(image) else 2**31 - 1
            values = np.array(image).astype(np.int64)  # [H, W]
        else:
            white, values = 255, np.array(image.convert("L"))  # [H, W]
    if mode == "F":
        raise ValueError(f"{path} must contain integers, got mode F")
    return _foreground(values, white, path)


def load_pair(sample: SegmentationSample) -> tuple[Image.Image, Image.Image]:
    """Read image (8-bit RGB) and mask (8-bit grey, 0 or 255, the union of the sample's masks), of one size.

    Raises:
        ValueError: a file cannot be read, or a mask differs from the image in size.
    """
    image = read_image(sample.image)
    union = np.zeros((image.height, image.width), dtype=bool)  # [H, W]
    for path in sample.masks:
        mask = read_mask(path, image.size)  # [H, W]
        if mask.shape != union.shape:
            raise ValueError(
                f"{path} must have the size of its image {sample.image.name}, "
                f"{image.width}x{image.height}, got {mask.shape[1]}x{mask.shape[0]}"
            )
        union |= mask
    return image, Image.fromarray(union.astype(np.uint8) * 255)


__all__ = [
    "LIMIT_VARIABLE",
    "apply_pixel_limit",
    "load_pair",
    "opened",
    "read_image",
    "read_mask",
]
