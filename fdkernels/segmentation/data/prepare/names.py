"""Anonymous names of pairs."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter

_HASH_DIGITS = 16


class PairNames:
    """Generates names patientGROUP_IMAGE; pairs of one patient share the group.

    Without a key both parts are running numbers in call order (patient001_1, patient001_2,
    patient002_1). With a key they are the first 64 bits of an HMAC-SHA256: stable when pairs are added,
    and impossible to compute or invert without the key.

    Args:
        hash_key: the secret key, or None for running numbers.
    """

    def __init__(self, hash_key: bytes | None) -> None:
        self._key = hash_key
        self._groups: dict[str, int] = {}
        self._images: Counter[str] = Counter()

    def next(self, group: str, image: str) -> str:
        """Return the name of the next pair.

        Args:
            group: identifier of the patient.
            image: identifier of the pair, unique within the patient.
        """
        if self._key is not None:
            return f"patient{_hash(self._key, 'group', group)}_{_hash(self._key, 'image', group, image)}"
        number = self._groups.setdefault(group, len(self._groups) + 1)
        self._images[group] += 1
        return f"patient{number:03d}_{self._images[group]}"


def _hash(key: bytes, *parts: str) -> str:
    return hmac.new(key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:_HASH_DIGITS]


__all__ = ["PairNames"]
