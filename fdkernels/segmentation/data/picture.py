"""The stored values of an image file, and what the file says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

LUMINANCE = (299, 587, 114)  # thousandths of red, green and blue, as Pillow weighs them


@dataclass(frozen=True)
class Picture:
    """An image as its file stores it, turned upright.

    Attributes:
        values: [H, W] grey values or palette indices, or [H, W, 3] colours.
        top: the largest value that their depth can hold: 1, 3, 15, 255, 4095, 65535 or more.
        alpha: [H, W], or None.
        palette: uint8 [entries, 3], the colours that indices stand for; None for grey and colours.
        white_is_zero: grey values are stored the other way round, 0 for white.
        said_bits: bits that the values use, if the file says that they are fewer than stored.
        lossy: compressed in a way that changes values.
    """

    values: np.ndarray
    top: int
    alpha: np.ndarray | None = None
    palette: np.ndarray | None = None
    white_is_zero: bool = False
    said_bits: int | None = None
    lossy: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the values are floating point numbers."""
        return self.values.dtype.kind == "f"

    @property
    def is_wide(self) -> bool:
        """Whether the values are not unsigned integers of at most 16 bits."""
        return self.values.dtype.kind != "u" or self.top > 65535

    def colours(self, path: Path) -> np.ndarray:
        """Look up the colours of palette indices, uint8 [H, W, 3].

        Raises:
            ValueError: the palette has fewer colours than the image uses.
        """
        if self.palette is None:
            raise ValueError(f"{path} must have a palette, got none")
        if self.values.size and (highest := int(self.values.max())) >= len(self.palette):
            raise ValueError(f"{path} uses entry {highest} of a palette of {len(self.palette)} colours")
        found: np.ndarray = self.palette[self.values]
        return found

    def bits(self, path: Path, named: int | None = None) -> int:
        """Return how many bits the values use of those they are stored in.

        16-bit files of 10-, 12- or 14-bit cameras seldom say so. Where the highest bit is used nowhere and
        neither the file nor `named` says how many are, a true 16-bit image that is dark cannot be told from
        one of fewer bits, so the file is refused.

        Raises:
            ValueError: the number of bits cannot be known, or values exceed the `named` one.
        """
        stored = self.top.bit_length()
        if stored <= 12:  # 8 bits and fewer are used in full; 12 are stored by files that pack them
            return stored
        highest = int(self.values.max(initial=0))
        if named is not None:
            if highest >= 2**named:
                raise ValueError(f"{path} must have values below {2**named} for {named} bits, got {highest}")
            return named
        if self.said_bits is not None and highest < 2**self.said_bits:
            # PNG means values scaled up to 16 bits, most writers leave them as they are: low bits tell.
            scaled_up = not np.any(self.values % (1 << (stored - self.said_bits)))
            if not scaled_up:
                return self.said_bits
        if 0 < highest < 2 ** (stored - 1):
            raise ValueError(
                f"{path} has 16 bits, but no value above {highest}, which {highest.bit_length()} bits hold, "
                "and does not say how many are used; say it with --image-bits, such as --image-bits 12, or "
                "--image-bits 16 for dark images that use 16"
            )
        return stored

    def eight_bits(self, path: Path, named: int | None = None) -> np.ndarray:
        """Scale the values to 8 bits as they are shown, uint8 [H, W] or [H, W, 3].

        Args:
            path: the file, for messages.
            named: how many of 16 bits are used; None for what the file says.

        Raises:
            ValueError: values are not integers of 8 or 16 bits, or as `bits`.
        """
        if self.palette is not None:
            return self.colours(path)
        if self.is_wide:
            raise ValueError(
                f"{path} must have 8 or 16 bits a channel, got mode {'F' if self.is_float else 'I'}"
            )
        top = 2 ** self.bits(path, named) - 1
        scaled = self.values
        if top != 255:
            scaled = ((self.values.astype(np.uint32) * 510 + top) // (2 * top)).astype(np.uint8)
        return 255 - scaled if self.white_is_zero else scaled


def luminance(colours: np.ndarray) -> np.ndarray:
    """Weigh colours [H, W, 3] to grey, float64 [H, W]."""
    weighed: np.ndarray = colours @ np.array(LUMINANCE) / 1000
    return weighed


__all__ = ["Picture", "luminance"]
