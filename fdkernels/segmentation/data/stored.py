"""Read image files of any format to the values they store."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from fdkernels.segmentation.data.opening import opened
from fdkernels.segmentation.data.picture import Picture
from fdkernels.segmentation.data.tiff import TiffTags, is_tiff, read_tags, read_wide, sixteen_bits

_LOSSY = frozenset({"JPEG", "WEBP", "JPEG2000", "AVIF"})
_PNG_GREY, _PNG_GREY_ALPHA = 0, 4
# Modes whose values are those of the file; the others (CMYK, YCbCr) are converted.
_AS_STORED = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "F", "I", "I;16", "I;16B", "I;16L"})


def read_picture(path: Path) -> Picture:
    """Read the values that the file at `path` stores, upright.

    Raises:
        ValueError: the file cannot be read, contains several images, or exceeds Pillow's limit against
            decompression bombs.
    """
    tags = read_tags(path) if is_tiff(path) else None
    if tags is not None and not tags.pillow_is_right:
        return read_wide(path, tags)
    with opened(path) as image:
        if image.format != "PNG":
            return _of_pillow(image, 8 if tags is None else tags.bits, tags)
        depth, kind, significant = _png_header(path)
        if depth != 16:
            return _of_pillow(image, depth, None)
        if kind == _PNG_GREY:
            return Picture(np.array(image).astype(np.uint16), 65535, said_bits=significant)
    if kind == _PNG_GREY_ALPHA:
        with opened(path, low_bytes=True) as image:
            four = np.array(image).astype(np.uint16)  # [H, W, 4], two bytes of grey and two of alpha
        pairs = four[..., ::2] << 8 | four[..., 1::2]  # [H, W, 2]
        return Picture(pairs[..., 0], 65535, pairs[..., 1], said_bits=significant)
    values = sixteen_bits(path)  # [H, W, 3 or 4]
    alpha = values[..., 3] if values.shape[2] == 4 else None
    return Picture(values[..., :3], 65535, alpha, said_bits=significant)


def _png_header(path: Path) -> tuple[int, int, int | None]:
    """Read depth, colour type and significant bits (sBIT, None without) of a PNG that Pillow has read."""
    significant = None
    with path.open("rb") as content:
        content.seek(8)
        while True:
            size, name = struct.unpack(">I4s", content.read(8))
            if name == b"IHDR":
                depth, kind = struct.unpack(">8xBB3x", content.read(size))
            elif name == b"sBIT":
                significant = max(content.read(size), default=0)
            elif name in {b"IDAT", b"IEND"}:
                break
            else:
                content.seek(size, 1)
            content.seek(4, 1)  # the checksum
    declares = significant is not None and 0 < significant < depth
    return depth, kind, significant if declares else None


def _of_pillow(image: Image.Image, bits: int, tags: TiffTags | None) -> Picture:
    """Take the values of an image of at most 8 bits, or of a rare format, as Pillow decodes it.

    Args:
        image: grey of fewer than 8 bits is scaled to 8, WhiteIsZero is inverted.
        bits: of a sample in the file.
        tags: of a TIFF file.
    """
    if image.mode in {"La", "RGBa"}:
        image = image.convert(image.mode.upper())
    elif image.mode not in _AS_STORED:
        image = image.convert("RGB")
    values = np.array(image)  # [H, W] or [H, W, bands]
    alpha, palette = None, None
    if image.mode in {"LA", "PA", "RGBA"}:
        alpha = values[..., -1]
        values = values[..., :3] if image.mode == "RGBA" else values[..., 0]
    if image.mode in {"P", "PA"}:
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if tags is None else tags.palette
    if image.mode == "1":
        values, bits = values.astype(np.uint8), 1
    elif image.mode in {"L", "LA"}:
        values = values // (255 // (2**bits - 1))
    elif image.mode[0] == "I":
        bits = 16 if values.dtype.kind == "u" else 31
    top = 2**bits - 1
    white_is_zero = tags is not None and tags.white_is_zero
    return Picture(
        (top - values).astype(np.uint8) if white_is_zero else values,
        top,
        alpha,
        palette,
        white_is_zero=white_is_zero,
        lossy=image.format in _LOSSY if tags is None else tags.is_lossy,
    )


__all__ = ["read_picture"]
