"""Read TIFF files by their tags: with Pillow where it is right, with tifffile elsewhere.

Pillow reads samples of up to 8 bits well, of any compression. Of those above 8 bits it reads planes that
are not compressed as noise, big-endian integers that are compressed in the wrong byte order, colours at 8
bits, and it does not invert WhiteIsZero.
"""

from __future__ import annotations

import importlib.util
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tifffile import TiffFile, TiffPage

from fdkernels.segmentation.data.opening import check_pixels, opened
from fdkernels.segmentation.data.picture import Picture

_MAGIC = (b"II\x2a\0", b"MM\0\x2a", b"II\x2b\0", b"MM\0\x2b")
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = 0, 1, 2, 3
_PREMULTIPLIED = 1
_SEPARATE = 2
_LOSSY = frozenset({6, 7, 33003, 33005, 34712, 50001})  # JPEG, JPEG 2000, WebP
_NONE, _PACKBITS, _DEFLATE = 1, 32773, (8, 32946)
_MAX_SAMPLE_VALUE, _ORIENTATION, _COLOUR_MAP = 281, 274, 320

# Without a handler of its own, tifffile's remarks on odd tags would go to the terminal.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class TiffTags:
    """What the tags of a TIFF file say about its image.

    Attributes:
        size: width and height in pixels, as stored.
        bits: of a sample.
        samples: in a pixel.
        format: of a sample: unsigned (1), signed (2), float (3).
        photometric: meaning of the samples: WhiteIsZero, BlackIsZero, RGB, palette.
        extras: meaning of the samples beyond grey or colours.
        separate: each sample has its own plane.
        compression: its number.
        orientation: 1 to 8.
        said_bits: bits of the tag MaxSampleValue, if that is 2^n - 1 and below the samples' own range.
        palette: uint8 [entries, 3], or None.
    """

    size: tuple[int, int]
    bits: int
    samples: int
    format: int
    photometric: int
    extras: tuple[int, ...]
    separate: bool
    compression: int
    orientation: int
    said_bits: int | None
    palette: np.ndarray | None

    @property
    def colours(self) -> int:
        """Samples of a pixel without the extra ones."""
        return {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1}.get(
            self.photometric, self.samples
        )

    @property
    def white_is_zero(self) -> bool:
        """Whether 0 is shown white."""
        return self.photometric == _WHITE_IS_ZERO

    @property
    def pillow_is_right(self) -> bool:
        """Whether Pillow reads every bit of such a file."""
        grey_planes = self.separate and self.colours == 1 and self.samples > 1
        return self.bits <= 8 and self.format == _UNSIGNED and not grey_planes

    @property
    def is_lossy(self) -> bool:
        """Whether the compression changes values."""
        return self.compression in _LOSSY

    @property
    def decodable(self) -> bool:
        """Whether tifffile can decompress the file."""
        without_help = self.compression in {_NONE, _PACKBITS, *_DEFLATE}
        return without_help or importlib.util.find_spec("imagecodecs") is not None

    def picture(self, values: np.ndarray, alpha: np.ndarray | None) -> Picture:
        """Describe values and alpha, which are upright."""
        return Picture(
            values,
            2**self.bits - 1,
            alpha,
            self.palette,
            white_is_zero=self.white_is_zero,
            said_bits=self.said_bits,
            lossy=self.is_lossy,
        )


def is_tiff(path: Path) -> bool:
    """Return whether the file begins as TIFF or BigTIFF does.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as content:
            return content.read(4) in _MAGIC
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_tags(path: Path) -> TiffTags:
    """Read the tags of a file of one image that has grey, palette or colours, and at most one alpha.

    Raises:
        ValueError: they cannot be read, the file exceeds Pillow's limit against decompression bombs, or it
            contains several images or samples of no known meaning.
    """
    try:
        with TiffFile(path) as file:
            pages = len(file.pages)
            page = file.pages.first
            tags = _tags_of(page)
            stacked = 1 if file.imagej_metadata is None else int(file.imagej_metadata.get("images", 1))
            depth = int(page.imagedepth)
            largest = max(tags.size[0] * tags.size[1], int(page.tilewidth) * int(page.tilelength))
    except Exception as error:  # tifffile documents no set of its own
        raise ValueError(f"{path} cannot be read: {error}") from error
    if (images := max(pages, stacked) * depth) != 1:
        raise ValueError(f"{path} must contain one image, got {images}")
    check_pixels(path, largest)
    extras = tags.samples - tags.colours
    if extras > 1 or extras < 0 or (extras and tags.colours == 1 and tags.extras[:1] in {(), (0,)}):
        raise ValueError(
            f"{path} must have grey or RGB, and at most an alpha channel, got {tags.samples} samples a pixel"
        )
    return tags


def _tags_of(page: TiffPage) -> TiffTags:
    bits, formats = _one(page.bitspersample), _one(page.sampleformat)
    photometric = int(page.photometric)
    highest = page.tags.valueof(_MAX_SAMPLE_VALUE)
    said = max(np.ravel(highest).tolist()) + 1 if highest is not None else 0
    declares = said > 1 and said & (said - 1) == 0 and said < 2**bits
    return TiffTags(
        size=(int(page.imagewidth), int(page.imagelength)),
        bits=bits,
        samples=int(page.samplesperpixel),
        format=_UNSIGNED if formats == 4 else formats,  # 4 is "undefined"
        photometric=photometric,
        extras=tuple(int(extra) for extra in page.extrasamples),
        separate=int(page.planarconfig) == _SEPARATE,
        compression=int(page.compression),
        orientation=int(page.tags.valueof(_ORIENTATION, default=1)),
        said_bits=said.bit_length() - 1 if declares else None,
        palette=_palette(page.tags.valueof(_COLOUR_MAP)) if photometric == _PALETTE else None,
    )


def _one(values: int | tuple[int, ...]) -> int:
    """Return the value that all samples share."""
    found = set(np.ravel(values).tolist())
    if len(found) != 1:
        raise ValueError(f"its samples must have one depth and one format, got {values}")
    return int(found.pop())


def _palette(entries: tuple[int, ...]) -> np.ndarray:
    """Bring a colour map, all reds, then greens, then blues, to uint8 [entries, 3]."""
    colours = np.array(entries, np.uint32).reshape(3, -1).T  # [entries, 3]
    # The map has 16 bits, but some writers fill it with 8-bit values, which would be black.
    return (colours if colours.max(initial=0) < 256 else colours >> 8).astype(np.uint8)


def read_wide(path: Path, tags: TiffTags) -> Picture:
    """Read a file that Pillow does not read right, see `TiffTags.pillow_is_right`.

    Raises:
        ValueError: the file cannot be decoded, or needs a package for that.
    """
    if tags.photometric not in {_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE}:
        raise ValueError(
            f"{path} must have grey, RGB or a palette at {tags.bits} bits, got photometric {tags.photometric}"
        )
    if tags.bits == 12 and tags.compression == _NONE and tags.samples == 1:
        with opened(path) as image:  # tifffile does not unpack 12 bits by itself
            return tags.picture(np.array(image).astype(np.uint16), None)
    if tags.decodable:
        return tags.picture(*_split(_upright(_decoded(path, tags), tags.orientation), tags, path))
    if tags.format == _UNSIGNED and tags.bits == 16 and tags.photometric in {_BLACK_IS_ZERO, _RGB}:
        return tags.picture(*_split(_by_pillow(path, tags), tags, path))
    raise _needs_imagecodecs(path, tags)


def _needs_imagecodecs(path: Path, tags: TiffTags) -> ValueError:
    return ValueError(
        f"{path} has {tags.samples} samples of {tags.bits} bits in compression {tags.compression}, which "
        "needs a package: pip install imagecodecs; or save it uncompressed, with deflate, or as PNG"
    )


def _by_pillow(path: Path, tags: TiffTags) -> np.ndarray:
    """Read compressed unsigned 16 bits, upright, [H, W] or [H, W, samples], where Pillow has both bytes."""
    if tags.samples == 1:
        with opened(path) as image:
            return np.array(image).astype(np.uint16)
    if tags.separate or tags.samples == 2 or tags.extras[:1] not in {(), (2,)}:
        raise _needs_imagecodecs(path, tags)
    return sixteen_bits(path)


def sixteen_bits(path: Path) -> np.ndarray:
    """Read 16-bit colours, of which Pillow gives the high bytes or the low ones, uint16 [H, W, 3 or 4].

    Raises:
        ValueError: the file cannot be read.
    """
    with opened(path) as image:
        high = np.array(image).astype(np.uint16)  # [H, W, C]
    with opened(path, low_bytes=True) as image:
        both: np.ndarray = (high << 8) | np.array(image)
    return both


def _decoded(path: Path, tags: TiffTags) -> np.ndarray:
    """Decode with tifffile, [H, W], [H, W, samples] or [samples, H, W] as stored, in native byte order."""
    try:
        with TiffFile(path) as file:
            page = file.pages.first
            _check_data(page, tags)
            values = page.asarray(maxworkers=1)
    except Exception as error:  # tifffile documents no set of its own
        raise ValueError(f"{path} cannot be read: {error}") from error
    if tags.separate and tags.samples > 1:
        values = np.moveaxis(values, 0, -1)
    width, height = tags.size
    if values.shape[:2] != (height, width) or values.ndim > 3:
        raise ValueError(f"{path} must have {height} rows of {width} pixels, got shape {list(values.shape)}")
    return values.astype(values.dtype.newbyteorder("="))


def _check_data(page: TiffPage, tags: TiffTags) -> None:
    """Refuse data that is missing, which tifffile fills with 0, or that inflates beyond its tile or strip."""
    expected = int(np.prod(page.chunked))
    if len(page.databytecounts) != expected or not all(page.databytecounts):
        raise ValueError(f"it must hold the data of {expected} tiles or strips")
    if tags.compression not in _DEFLATE:
        return
    chunk = int(np.prod(page.chunks)) * tags.bits // 8
    handle = page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        handle.seek(offset)
        inflating = zlib.decompressobj()
        inflating.decompress(handle.read(count), chunk + 1)
        if inflating.unconsumed_tail:
            raise ValueError(f"a tile or strip holds more than its {chunk} bytes, a decompression bomb")


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [H, W] or [H, W, C] as the orientation tag says; as Pillow, leave it for unknown numbers."""
    if orientation in {5, 6, 7, 8}:
        values = values.swapaxes(0, 1)
    if orientation in {2, 3, 6, 7}:
        values = values[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        values = values[::-1]
    return np.ascontiguousarray(values)


def _split(values: np.ndarray, tags: TiffTags, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Split [H, W] or [H, W, samples] into grey or colours, and alpha."""
    if values.ndim == 2:
        return values, None
    found, alpha = values[..., : tags.colours], None
    if tags.samples > tags.colours:
        alpha = values[..., tags.colours]
        if tags.extras[:1] == (_PREMULTIPLIED,) and not (alpha == 2**tags.bits - 1).all():
            raise ValueError(f"{path} has colours multiplied by a partial alpha; save it without alpha")
    return (found[..., 0] if tags.colours == 1 else found), alpha


__all__ = ["TiffTags", "is_tiff", "read_tags", "read_wide", "sixteen_bits"]
