"""Lookup tables of DICOM files: palettes, modality and value-of-interest tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut

_COLOURS = ("Red", "Green", "Blue")
_WORDS = 2**16


@dataclass(frozen=True)
class Table:
    """A lookup table.

    Attributes:
        entries: [E] or [E, 3] (RGB), integers.
        first: stored value of the first entry; lower values take it too, higher ones the last entry.
        white: value of an entry that is displayed at full brightness.
    """

    entries: np.ndarray
    first: int
    white: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Look up stored values [H, W]; returns [H, W], or [H, W, 3] from a palette."""
        # In pydicom's own lookup the index has the type of the entries, so that it wraps at 256.
        place = np.asarray(values).astype(np.int64) - self.first
        found: np.ndarray = self.entries[place.clip(0, len(self.entries) - 1)]
        return found


def white_of(values: np.ndarray, bits: int) -> int:
    """Return the value of full brightness: 255 where no value of a wider type exceeds 8 bits.

    Some devices write 8-bit values where the file says 16; at the scale of 16 bits every one is black.
    """
    return 255 if bits > 8 and int(values.max(initial=0)) <= 255 else int(2**bits - 1)


def grey_table(dataset: Dataset, sequence: str) -> Table:
    """Read the first item of "ModalityLUTSequence" or "VOILUTSequence".

    Raises:
        ValueError: the table has fewer entries than its descriptor says.
    """
    item = dataset[sequence].value[0]
    count, first, bits = _descriptor(item.LUTDescriptor)
    entries = _entries(item.LUTData, count, _is_big_endian(dataset), f"the first table of {sequence}")
    return Table(entries, first, white_of(entries, bits))


def palette(dataset: Dataset) -> Table:
    """Read the palette of a PALETTE COLOR image.

    Entries are words in the byte order of the file, or 8 bits each, two a word. Words that hold 8-bit
    values are taken as such, whatever the descriptor says (`white_of`).

    Raises:
        ValueError: there is no palette, or it has fewer entries than its descriptor says.
    """
    if "RedPaletteColorLookupTableDescriptor" not in dataset:
        raise ValueError("PALETTE COLOR needs a Red Palette Color Lookup Table Descriptor, which is missing")
    count, first, bits = _descriptor(dataset.RedPaletteColorLookupTableDescriptor)
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        if bits == 8 and count > 256:
            raise ValueError(f"a segmented palette of 8 bits must have at most 256 entries, got {count}")
        entries = apply_color_lut(np.arange(first, first + count), dataset)[:, :3]
        return Table(entries, first, white_of(entries, bits))
    missing = [colour for colour in _COLOURS if f"{colour}PaletteColorLookupTableData" not in dataset]
    if missing:
        raise ValueError(
            f"PALETTE COLOR needs {missing[0]} Palette Color Lookup Table Data, which is missing"
        )
    columns = [
        _entries(
            dataset[f"{colour}PaletteColorLookupTableData"].value,
            count,
            _is_big_endian(dataset),
            f"the {colour.lower()} palette",
        )
        for colour in _COLOURS
    ]
    entries = np.stack(columns, axis=1)  # [E, 3]
    return Table(entries, first, white_of(entries, 16))


def _descriptor(value: Any) -> tuple[int, int, int]:
    """Return number of entries, first stored value and bits of an entry."""
    count, first, bits = (int(part) for part in value)
    return count % _WORDS or _WORDS, first, bits


def _is_big_endian(dataset: Dataset) -> bool:
    return not dataset.file_meta.TransferSyntaxUID.is_little_endian


def _entries(data: Any, count: int, big_endian: bool, called: str) -> np.ndarray:
    """Read `count` entries, [E]: integers, words in the file's byte order, or bytes packed in words."""
    if not isinstance(data, bytes):
        words = np.atleast_1d(np.asarray(data, dtype=np.int64)) % _WORDS
    else:
        words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2" if big_endian else "<u2")
    if words.size >= count:
        return words[:count].astype(np.int64)
    packed = words.astype("<u2").view(np.uint8)
    if packed.size >= count:
        return packed[:count].astype(np.int64)
    raise ValueError(f"{called} must have the {count} entries that its descriptor says, got {words.size}")


__all__ = ["Table", "grey_table", "palette", "white_of"]
