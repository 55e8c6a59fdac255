"""Change files at random: bits, lengths, pieces, numbers of text; checksums are made right again."""

from __future__ import annotations

import io
import random
import re
import struct
import zipfile
import zlib

LENGTHS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
)
NUMBERS = (
    b"-1", b"0", b"1e308", b"1e400", b"-1e400", b"NaN", b"Infinity", b"", b"0x10", b"9" * 30, b"9" * 5000,
    b"1.5", b"1_000", b"true", b"null", b"[]", b"{}", b'"x"', "\u0661".encode(),
)  # fmt: skip
PIECES = (
    b"\0", b"\xff\xfe", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"&#0;", b"]]>",
    b"<Region>", b"../../", b"\\ud800",
    b"[" * 3000,
)  # fmt: skip


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at : at + rng.randint(1, 4)] = bytes(
        rng.choice((0, 1, 0x7F, 0x80, 0xFF)) for _ in range(rng.randint(1, 4))
    )


def _length(rng: random.Random, data: bytearray) -> None:
    """Write a number as wide as a field over another; more often near the front, where headers are."""
    size = rng.choice("HIQ")
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 512))
    field = struct.pack(rng.choice("<>") + size, rng.choice(LENGTHS) % 2 ** (8 * struct.calcsize(size)))
    data[at : at + len(field)] = field


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _slice(rng: random.Random, data: bytearray) -> slice:
    at = rng.randrange(len(data))
    return slice(at, at + rng.randint(1, max(1, min(256, len(data) // 2))))


def _delete(rng: random.Random, data: bytearray) -> None:
    del data[_slice(rng, data)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    piece = data[_slice(rng, data)]
    at = rng.randrange(len(data))
    data[at:at] = piece * rng.choice((1, 1, 2, 40))


def _swap(rng: random.Random, data: bytearray) -> None:
    first, second = _slice(rng, data), _slice(rng, data)
    data[first], data[second] = data[second], data[first]


def _noise(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randint(1, 64))


def _number(rng: random.Random, data: bytearray) -> None:
    """Put another value in the place of a number of text."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?", data))
    if found:
        chosen = rng.choice(found)
        data[chosen.start() : chosen.end()] = rng.choice(NUMBERS)


def _value(rng: random.Random, data: bytearray) -> None:
    """Put another value in the place of one of JSON, quotes and all, or of an attribute."""
    found = list(re.finditer(rb'(?<=: )(?:"[^"]*"|[^,\n]+)|"[^"]*"', data))
    if found:
        chosen = rng.choice(found)
        data[chosen.start() : chosen.end()] = rng.choice((*NUMBERS, b'"%s"' % rng.choice(NUMBERS)))


def _piece(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.choice(PIECES)


BINARY = (_flip, _flip, _set, _length, _length, _length, _truncate, _delete, _repeat, _swap, _noise)
TEXT = (_number, _number, _value, _value, _piece, _delete, _repeat, _swap, _flip, _truncate)


def mutate(rng: random.Random, content: bytes, *, text: bool = False) -> bytes:
    """The content with one to four changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        rng.choice(TEXT if text else BINARY)(rng, data)
    return bytes(data)


def with_png_checksums(content: bytes) -> bytes:
    """The content with right checksums as far as it is a PNG, so that a reader goes on past them."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def in_pickle_of_zip(rng: random.Random, content: bytes) -> bytes:
    """A checkpoint whose pickle is changed, in a whole zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = mutate(rng, data)
            new.writestr(entry.filename, data)
    return out.getvalue()


def in_header_of_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Weights whose JSON header is changed, under its right length."""
    (length,) = struct.unpack_from("<Q", content)
    header = mutate(rng, content[8 : 8 + length], text=True)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
