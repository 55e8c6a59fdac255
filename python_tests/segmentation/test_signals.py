"""SIGTERM of a scheduler and SIGHUP of a closed terminal end a run with their code, wherever it is."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from typer.testing import CliRunner

from fdkernels.cli import app
from fdkernels.segmentation import train
from fdkernels.segmentation.config import TrainingConfig
from fdkernels.segmentation.module import SegmentationModule
from fdkernels.segmentation.signals import ending_on_signals
from tiny_data import write_tiny_tnbc

SENT = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
SHORT = ["--base-channels=2", "--size=32", "--batch-size=2", "--epochs-warm=1", "--epochs-active=1"]
SHORT += ["--limit-batches=2", "--accelerator=cpu", "--no-tensorboard"]


@pytest.fixture(autouse=True)
def _default_handlers():
    """Those of a terminal: under nohup and in the background some signals are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SENT}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number):
    os.kill(os.getpid(), number)
    time.sleep(60)  # the handler ends it
    pytest.fail(f"{number} was not handled")


@pytest.mark.parametrize("number", SENT)
def test_a_signal_ends_the_block_with_its_code(number):
    with pytest.raises(SystemExit) as ended, ending_on_signals():
        _send(number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_counts_whatever_is_raised_on_it():
    def as_lightning():
        try:
            _send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise SystemExit from None  # without a code

    with pytest.raises(SystemExit) as ended, ending_on_signals():
        as_lightning()
    assert ended.value.code == 143


def test_without_a_signal_nothing_is_changed():
    with ending_on_signals():
        pass
    with pytest.raises(KeyError), ending_on_signals():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_that_are_ignored_or_handled_stay_so():
    received = []
    signal.signal(SENT[-1], signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    with ending_on_signals():
        for number in {SENT[-1], signal.SIGTERM}:
            os.kill(os.getpid(), number)
    assert received == [signal.SIGTERM]


def test_a_thread_leaves_the_handlers_alone():
    found = []

    def work():
        with ending_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_tnbc(tmp_path_factory.mktemp("tnbc"))


PLACES = {
    "while the images are read": (train, "find_data"),
    "in a training step": (SegmentationModule, "training_step"),
    "in validation": (SegmentationModule, "validation_step"),
    "between training and test": (train, "write_weights"),
    "in the test": (SegmentationModule, "test_step"),
}


@pytest.mark.parametrize("number", SENT)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_ends_with_the_code_of_the_signal_and_says_how_to_resume(
    data, tmp_path, monkeypatch, place, number
):
    owner, name = PLACES[place]
    monkeypatch.setattr(owner, name, lambda *arguments, **options: _send(number))
    folder = tmp_path / "runs" / "[lr=1e-3]"
    ended = CliRunner().invoke(app, ["train", "--data", str(data), "--output", str(folder), *SHORT])
    assert ended.exit_code == 128 + number
    said = ended.output.splitlines()[-1]
    if name == "find_data":
        assert said == "Interrupted. The training had not begun; start it again with the same command."
    else:
        assert said == f"Interrupted. Continue with: fdkernels train --output '{folder}' --resume"


def test_a_script_that_trains_ends_with_the_code_too(data, tmp_path, monkeypatch):
    monkeypatch.setattr(SegmentationModule, "training_step", lambda *arguments: _send(signal.SIGTERM))
    config = TrainingConfig("tnbc", str(data), str(tmp_path), base_channels=2, size=32, accelerator="cpu")
    with pytest.raises(SystemExit) as ended:
        train.train(config, progress=False)
    assert ended.value.code == 143
