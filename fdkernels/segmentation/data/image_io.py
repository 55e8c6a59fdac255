"""Images and masks as they are read from files that may be broken, foreign or too large."""

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
# What Pillow raises on broken files; SyntaxError is its word for a broken PNG.
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
_GREY = 0.2  # the greatest share of middle greys, in pixels of foreground


@cache
def apply_pixel_limit() -> None:
    """Takes Pillow's limit against decompression bombs from the environment, where it is set."""
    wanted = os.environ.get(LIMIT_VARIABLE)
    if wanted is None:
        return
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of pixels, 1 or more, got {wanted!r}")
    Image.MAX_IMAGE_PIXELS = int(wanted)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image at `path`; what Pillow raises on opening or decoding it becomes a ValueError."""
    apply_pixel_limit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Of broken metadata and dropped transparency, neither of which is read here.
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames == 1:
                    yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} cannot be read: {error} If you trust the file, set the environment variable "
            f"{LIMIT_VARIABLE} (or PIL.Image.MAX_IMAGE_PIXELS) to the pixels you allow."
        ) from error
    except _BROKEN as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if frames != 1:
        raise ValueError(f"{path} must hold one image, got {frames}")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether the image is grey of 16 bits; older Pillow opens a PNG of that kind as mode I."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def read_image(path: Path) -> Image.Image:
    """The image at `path` as 8-bit RGB.

    An alpha channel is dropped, a palette resolved, grey repeated. Grey of 16 bits is scaled by
    255/65535 and rounded, whatever range the image uses, so that images stay comparable.

    Raises:
        ValueError: the file cannot be read, holds several images, is larger than Pillow's limit
            against decompression bombs, or holds 32-bit or float pixels.
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
    """Where grey `values` [H, W] mean foreground; `white` is the highest value of their type."""
    eight_bits = values.dtype == np.uint8
    grey = np.flatnonzero(np.bincount(values.ravel())) if eight_bits else np.unique(values)
    if grey[0] < 0:
        raise ValueError(f"{path} must hold no value below 0, got {grey[0]}")
    if grey[grey > 0].size <= 1:
        return values > 0
    foreground: np.ndarray = values > white / 2
    middle = np.count_nonzero((values > white / 4) & (values < 3 * white / 4))
    if middle <= _GREY * np.count_nonzero(foreground) and foreground.any():
        return foreground
    raise ValueError(
        f"{path} must hold 0 for background and one other value for foreground, or be nearly black "
        f"and white, got {grey.size} grey values between {grey[0]} and {grey[-1]}, with {middle} "
        f"pixels in the middle greys and {np.count_nonzero(foreground)} above half of white"
    )


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The mask at `path` as bool [H, W], True in the foreground.

    An image with 0 and one other value is foreground where it is not 0. One with more grey
    values, as lossy compression and smoothed edges leave them, is cut at half of white if that is
    clear: the pixels between a quarter and three quarters of white must be no more than a fifth
    of those above the cut. Colours count by their luminance, an alpha channel never counts.

    Args:
        path: an image, or polygons in an ImageScope `.xml`.
        size: width and height; needed for polygons, which do not tell it.

    Raises:
        ValueError: the file cannot be read, or its greys leave open what is foreground.
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
        raise ValueError(f"{path} must hold integers, got mode F")
    return _foreground(values, white, path)


def load_pair(sample: SegmentationSample) -> tuple[Image.Image, Image.Image]:
    """Image (RGB) and mask (L, 0 or 255, the union of the sample's masks), of one size.

    Raises:
        ValueError: a file cannot be read, or a mask has another size than the image.
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
