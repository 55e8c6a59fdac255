"""Ranges of seeds over processes, in order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

BLOCK = 500  # seeds that a process takes at once


def in_parallel(
    run: Callable[..., list[Any]], first: int, count: int, jobs: int, *arguments: Any
) -> Iterator[tuple[int, list[Any]]]:
    """How many seeds are done, and what `run(first, count, *arguments)` gave for the last block of them."""
    blocks = [(at, min(BLOCK, first + count - at)) for at in range(first, first + count, BLOCK)]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(max(1, min(jobs, len(blocks))), mp_context=context) as pool:
        waiting = [pool.submit(run, at, size, *arguments) for at, size in blocks]
        for (at, size), future in zip(blocks, waiting, strict=True):
            yield at + size - first, future.result()
