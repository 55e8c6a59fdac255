"""Read the images and masks of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fdkernels.segmentation.data.foreground import foreground
from fdkernels.segmentation.data.opening import LIMIT_VARIABLE, apply_pixel_limit, opened
from fdkernels.segmentation.data.picture import luminance
from fdkernels.segmentation.data.polygons import polygon_mask
from fdkernels.segmentation.data.samples import SegmentationSample
from fdkernels.segmentation.data.stored import read_picture

SAID_BITS = "said_bits"  # key in the info of an image whose file says that it uses fewer than 16 bits


def read_image(path: Path, bits: int | None = None) -> Image.Image:
    """Read the image at `path` as 8-bit RGB, upright as its orientation tag (EXIF, TIFF) says.

    Drops an alpha channel, resolves a palette, repeats grey, inverts WhiteIsZero. Scales 16 bits by
    255/(2^b - 1) and rounds, where b is not taken from the values, so that images stay comparable: it is
    `bits`, or what the file says (sBIT of a PNG, MaxSampleValue of a TIFF), or 16.

    Args:
        path: the file.
        bits: how many of 16 are used, 9 to 16; None for what the file says.

    Raises:
        ValueError: the file cannot be read, contains several images, exceeds Pillow's limit against
            decompression bombs, or has signed, 32-bit or float pixels; or it has 16 bits of which the
            highest is used nowhere, and neither `bits` nor the file says how many are; or values exceed
            `bits`.
    """
    picture = read_picture(path)
    image = Image.fromarray(picture.eight_bits(path, bits)).convert("RGB")
    if bits is None and picture.palette is None and 8 < (used := picture.bits(path)) < 16:
        image.info[SAID_BITS] = used
    return image


def read_mask(path: Path, size: tuple[int, int] | None = None, values: str | None = None) -> np.ndarray:
    """Read the mask at `path` as bool [H, W], True in the foreground, upright as its orientation tag says.

    Foreground is what is not 0, as the file stores it, in any mode and depth, if there is one such value
    or colour. A palette must say the same by its colours. With more values, from lossy compression or
    anti-aliasing, the mask is thresholded at half of white, provided that it is a picture of black and
    white: the pixels between a quarter and three quarters of white must be at most a fifth of those above
    the threshold, and no flat patches or thin lines of a third value, such as labels have, may lie beside
    the edges. An alpha channel must not hold a shape of its own.

    Args:
        path: an image, or an ImageScope `.xml` with regions.
        size: width and height in pixels; required for regions, whose file does not contain it.
        values: stored values (grey values, palette indices) that are foreground, all others are background:
            numbers and ranges such as "1", "1,2" or "128-255".

    Raises:
        ValueError: the file cannot be read, its values leave open which are foreground, `values` is no such
            list or names values of a mask that has colours, or `size` is missing for regions.
    """
    if path.suffix.lower() == ".xml":
        if size is None:
            raise ValueError(f"size must be given for the polygons in {path}, got None")
        return polygon_mask(path, size)
    return foreground(read_picture(path), path, values)


def shown_grey(path: Path) -> np.ndarray:
    """Read the image at `path` as a viewer shows it, in grey [H, W], without alpha; wide values as stored.

    Raises:
        ValueError: the file cannot be read or contains several images.
    """
    picture = read_picture(path)
    if picture.palette is not None:
        return luminance(picture.colours(path))
    values = picture.values if picture.values.ndim == 2 else luminance(picture.values)
    return picture.top - values if picture.white_is_zero else values


def load_pair(sample: SegmentationSample) -> tuple[Image.Image, Image.Image]:
    """Read image (8-bit RGB) and mask (8-bit grey, 0 or 255, the union of the sample's masks), of one size.

    Raises:
        ValueError: a file cannot be read, or a mask differs from the image in size.
    """
    image = read_image(sample.image, sample.rules.image_bits)
    union = np.zeros((image.height, image.width), dtype=bool)  # [H, W]
    for path in sample.masks:
        mask = read_mask(path, image.size, sample.rules.mask_values)  # [H, W]
        if mask.shape != union.shape:
            raise ValueError(
                f"{path} must have the size of its image {sample.image.name}, "
                f"{image.width}x{image.height}, got {mask.shape[1]}x{mask.shape[0]}"
            )
        union |= mask
    return image, Image.fromarray(union.astype(np.uint8) * 255)


__all__ = [
    "LIMIT_VARIABLE",
    "SAID_BITS",
    "apply_pixel_limit",
    "load_pair",
    "opened",
    "read_image",
    "read_mask",
    "shown_grey",
]
