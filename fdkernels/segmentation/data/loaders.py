"""Seeds and worker counts of data loaders."""

from __future__ import annotations

import os

import numpy as np

# For runs with fewer images, starting worker processes costs more than it saves.
_TINY = 32
_MOST_WORKERS = 4


def derive_seed(*numbers: int) -> int:
    """Derive a 63-bit seed from `numbers` (each at least 0) and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(images: int) -> int:
    """Return the worker processes for a loader of that many images: 0 below 32, else one per core up to 4."""
    if images < _TINY:
        return 0
    return min(cores(), _MOST_WORKERS)


__all__ = ["cores", "default_workers", "derive_seed"]
