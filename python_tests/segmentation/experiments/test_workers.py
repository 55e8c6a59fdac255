from __future__ import annotations

import multiprocessing
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from fdkernels.segmentation.experiments import workers


class _OneRun:
    """The connection of a process that is sent one run."""

    def __init__(self):
        self.runs = [("ablation", SimpleNamespace(key="with/seed0/fold1"), None)]
        self.told = []

    def recv(self):
        if not self.runs:
            raise EOFError
        return self.runs.pop()

    def send(self, word):
        self.told.append(word)


@pytest.fixture
def no_other_threads(monkeypatch):
    """No thread that waits for the first process; Ctrl-C works again for the tests after this one."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "CUDA out of memory. Go on with --resume",
        ),
        (ValueError("no such image"), "no such image"),
        (ZeroDivisionError("no sentence"), "Traceback"),
    ],
)
def test_a_run_that_fails_says_why(no_other_threads, monkeypatch, error, told):
    def fail(*args):
        raise error

    monkeypatch.setattr(workers, "carry_out", fail)
    connection = _OneRun()
    workers._serve(connection, 0)
    ((kind, value),) = connection.told
    assert kind == "failed"
    assert value.startswith(told)


def test_a_process_whose_first_process_is_gone_ends_without_a_word(capfd):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=workers._tell, args=(theirs, "trained", 1))
    ours.close()
    process.start()
    theirs.close()
    process.join(timeout=60)
    assert process.exitcode == 1
    assert capfd.readouterr().err == ""
