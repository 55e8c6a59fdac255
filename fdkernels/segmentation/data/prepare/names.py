"""Names that say nothing about a patient."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter

_HASH_DIGITS = 16


class PairNames:
    """Gives pairs the names patientGROUP_IMAGE, in which pairs of one patient share the group.

    Both parts are running numbers in the order of the calls (patient001_1, patient001_2,
    patient002_1), or with a key the first 64 bits of an HMAC-SHA256, which stay the same when
    further pairs are added and which nobody can compute or invert without the key.

    Args:
        hash_key: the secret, or None for running numbers.
    """

    def __init__(self, hash_key: bytes | None) -> None:
        self._key = hash_key
        self._groups: dict[str, int] = {}
        self._images: Counter[str] = Counter()

    def next(self, group: str, image: str) -> str:
        """The name of the next pair.

        Args:
            group: what its patient has in common.
            image: what no other pair of that patient has.
        """
        if self._key is not None:
            return f"patient{_hash(self._key, 'group', group)}_{_hash(self._key, 'image', group, image)}"
        number = self._groups.setdefault(group, len(self._groups) + 1)
        self._images[group] += 1
        return f"patient{number:03d}_{self._images[group]}"


def _hash(key: bytes, *parts: str) -> str:
    return hmac.new(key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:_HASH_DIGITS]


__all__ = ["PairNames"]
