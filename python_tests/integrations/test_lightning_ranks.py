"""A fit on two ranks with half of each batch gives the weights and the α of one process with all of it."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


class EverySecond(Sampler):
    """Of a batch of two the first is for rank 0, the second for rank 1."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(int(os.environ.get("LOCAL_RANK", "0")), 6, 2))

    def __len__(self) -> int:
        return 3


def work(folder: Path) -> None:
    """Both ranks; Lightning starts the second by running this file once more."""
    from test_lightning import Module, Pictures, callback, criterion, trainer

    # A rank that waits for the other for ever would hold up all tests.
    faulthandler.dump_traceback_later(150, exit=True)
    torch.set_num_threads(1)
    crit, module = criterion(), Module()
    training = trainer(
        callback(crit), folder, max_epochs=2, devices=2, strategy="ddp", use_distributed_sampler=False
    )
    training.fit(module, DataLoader(Pictures(), batch_size=1, sampler=EverySecond()))
    results = [crit.alpha.detach(), *(each.detach() for each in module.network.parameters())]
    logged = {name: float(value) for name, value in training.callback_metrics.items()}
    torch.save((results, logged), folder / f"{training.global_rank}.pt")
    dist.barrier()
    # Without cleaning up: gloo's threads and the destructor of their group may wait for each other.
    os._exit(0)


def test_two_ranks_equal_one_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing keeps alpha the same" not in done.stderr

    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from test_lightning import NAMES, by_hand, criterion
    finally:
        del sys.path[0]
    crit = criterion()
    net = by_hand(crit, 2)
    (first, logged), (second, logged_by_second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert logged == logged_by_second
    assert logged.keys() == {f"{what}/{name}" for what in ("alpha", "discrepancy_loss") for name in NAMES}
    for ours, theirs, truth in zip(first, second, [crit.alpha, *net.parameters()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(ours, truth.detach())


if __name__ == "__main__":
    work(Path(sys.argv[1]))
