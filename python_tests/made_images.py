"""TIFF and PNG files, byte by byte, of kinds that no installed package writes."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def lzw(data: bytes) -> bytes:
    """Compress as TIFF's LZW does, in codes of 9 bits that are cleared before they grow."""
    codes = []
    for start in range(0, len(data), 200):
        codes += [256, *data[start : start + 200]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    return packed(bits)


def packed(bits: str) -> bytes:
    """Pack a string of 0 and 1, the last byte filled up."""
    whole = bits.ljust(-(-len(bits) // 8) * 8, "0")
    return bytes(int(whole[start : start + 8], 2) for start in range(0, len(whole), 8))


def tiff(tags: dict[int, list[int]], strips: list[bytes], order: str = "<") -> bytes:
    """Write a TIFF of one image from its tags (of 16-bit values) and its strips."""
    wide = {273, 279}  # offsets and sizes of the strips
    tags = {**tags, 273: [0] * len(strips), 279: [len(strip) for strip in strips]}
    first = 8 + 2 + 12 * len(tags) + 4
    for _ in range(2):  # the second time with the offsets that the first has found
        records, values = b"", b""
        for tag, content in sorted(tags.items()):
            kind, letter = (4, "I") if tag in wide else (3, "H")
            written = struct.pack(order + letter * len(content), *content)
            if len(written) > 4:
                place = struct.pack(order + "I", first + len(values))
                values += written
            else:
                place = written.ljust(4, b"\0")
            records += struct.pack(order + "HHI", tag, kind, len(content)) + place
        offset = first + len(values)
        tags[273] = [offset + sum(map(len, strips[:index])) for index in range(len(strips))]
    head = (b"II\x2a\0" if order == "<" else b"MM\0\x2a") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(tags)) + records + bytes(4) + values + b"".join(strips)


def png(values: np.ndarray, kind: int, depth: int = 16, significant: int | None = None) -> bytes:
    """Write a PNG of 8 or 16 bits from values [H, W, C]; `kind` is its colour type."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in values)
    said = b"" if significant is None else chunk(b"sBIT", bytes([significant] * channels))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = header + said + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


__all__ = ["lzw", "packed", "png", "tiff"]
