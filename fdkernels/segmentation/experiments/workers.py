"""The runs of an experiment, one after the other or side by side in processes of their own.

A process can be killed at any moment, as a run goes on from wherever it was broken off: so the processes are
killed where the experiment ends early, and end themselves where the process that started them is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fdkernels.segmentation.experiments.plan import Experiment, PlannedRun
from fdkernels.segmentation.experiments.running import carry_out

# What ends with a sentence, as on the command line.
_SENTENCES = (ValueError, TypeError, RuntimeError, OSError)


def carry_out_all(
    experiment: Experiment,
    runs: Sequence[PlannedRun],
    *,
    jobs: int,
    trained: Callable[[PlannedRun, int], Any],
    finished: Callable[[PlannedRun], Any],
) -> None:
    """Carry out the runs that are not finished.

    Args:
        experiment: to which they belong.
        runs: all runs; one stands after the run that it goes on from.
        jobs: how many side by side; 1 stays in this process.
        trained: called with a run and the number of its epochs that are trained.
        finished: called with a run once its scores are written.

    Raises:
        RuntimeError: a run has failed; the message names it.
    """
    folders = {run.key: run.folder for run in runs}
    waiting = [run for run in runs if not run.marker.exists()]
    if jobs == 1 or len(waiting) < 2:
        for run in waiting:
            try:
                carry_out(experiment, run, _first(run, folders), partial(trained, run))
            except _SENTENCES as error:
                raise RuntimeError(f"run {run.key} failed: {error}") from error
            finished(run)
        return
    workers = [_Worker(slot) for slot in range(min(jobs, len(waiting)))]
    try:
        _share_out(experiment, waiting, folders, workers, trained, finished)
    finally:
        for worker in workers:
            worker.end()


def _first(run: PlannedRun, folders: dict[str, Path]) -> Path | None:
    return None if run.goes_on_from is None else folders[run.goes_on_from]


def _share_out(
    experiment: Experiment,
    waiting: list[PlannedRun],
    folders: dict[str, Path],
    workers: Sequence[_Worker],
    trained: Callable[[PlannedRun, int], Any],
    finished: Callable[[PlannedRun], Any],
) -> None:
    """Give each idle worker the next run whose first phase is there, until all are finished."""
    idle, busy = list(workers), dict[Connection, tuple[_Worker, PlannedRun]]()
    missing = {run.key for run in waiting}
    waiting = list(waiting)
    while waiting or busy:
        for run in [one for one in waiting if one.goes_on_from not in missing][: len(idle)]:
            waiting.remove(run)
            worker = idle.pop(0)
            worker.connection.send((experiment.name, run, _first(run, folders)))
            busy[worker.connection] = worker, run
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker, run = busy[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, OSError) as error:
                worker.process.join(timeout=5)
                raise RuntimeError(
                    f"run {run.key} failed: its process ended with exit code {worker.process.exitcode}; "
                    "memory may have run out. Go on with --resume, with fewer --jobs"
                ) from error
            if kind == "trained":
                trained(run, value)
                continue
            del busy[connection]
            idle.append(worker)
            if kind == "failed":
                raise RuntimeError(f"run {run.key} failed: {value}")
            missing.discard(run.key)
            finished(run)


class _Worker:
    """A process that carries out the runs it is sent."""

    def __init__(self, slot: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process has no use of the GPU
        self.connection, theirs = context.Pipe()
        # Not daemonic: the loaders of a run have processes of their own.
        self.process = context.Process(target=_serve, args=(theirs, slot), name=f"run-{slot}")
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, slot: int) -> None:
    """Carry out runs until the connection ends. With several GPUs each process takes one, in turn."""
    from fdkernels.segmentation.experiments.registry import EXPERIMENTS

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if (devices := _visible_devices()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    while True:
        try:
            name, run, first = connection.recv()
        except EOFError:
            return
        try:
            carry_out(EXPERIMENTS[name], run, first, lambda epochs: _tell(connection, "trained", epochs))
        except torch.OutOfMemoryError as error:
            _tell(connection, "failed", f"{error} Go on with --resume, with fewer --jobs")
        except _SENTENCES as error:
            _tell(connection, "failed", str(error))
        except Exception:  # noqa: BLE001 -- of whatever kind, the first process tells of it
            _tell(connection, "failed", traceback.format_exc())
        else:
            _tell(connection, "finished", None)


def _tell(connection: Connection, kind: str, value: Any) -> None:
    """Send word to the first process; end at once where it is gone (`_end_with_parent` may be late)."""
    try:
        connection.send((kind, value))
    except BrokenPipeError:
        os._exit(1)


def _visible_devices() -> list[str] | None:
    """List the GPUs to share out; None for none, or for one, which all processes share."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    return devices if len(devices) > 1 else None


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


__all__ = ["carry_out_all"]
