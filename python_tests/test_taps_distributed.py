"""Taps under DistributedDataParallel and FSDP2: the gradients of two processes are those of one."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fdkernels as fdk

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

WORLD = 2
NAMES = ["encoder:0", "encoder:1.deep", "dec"]
SETUPS = ["DDP", "static_graph", "no_sync", "find_unused", "compiled", "FSDP2", "FSDP2 of blocks"]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fine = self.fine(images).relu()
        return fine, {"deep": self.deep(fine).relu()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.dec, self.head = nn.Conv2d(10, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        fine, deep = self.encoder(images)
        up = nn.functional.interpolate(deep["deep"], scale_factor=2)
        return self.head(self.dec(torch.cat([fine, up], 1)))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 2, (8, 8, 8), generator=generator)


def steps(net: nn.Module, parts: list[tuple[Tensor, Tensor]], fused: bool, waits: Any, group: Any) -> None:
    """Accumulate the gradients of two parts of a batch, twice, with taps that stay."""
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        for _ in range(2):
            for index, (images, mask) in enumerate(parts):
                with waits() if index < len(parts) - 1 else contextlib.nullcontext():
                    out = net(images)
                    features = taps if fused else taps.features
                    loss = fdk.feature_discrepancy_loss(features, mask, eps=0.1, group=group)
                    (out.square().mean() + loss).backward()


def wrap(setup: str) -> tuple[nn.Module, nn.Module, Any]:
    """The network, the same wrapped, and what keeps it from synchronising."""
    net = Net()
    if setup.startswith("FSDP2"):
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for block in (net.encoder, net.dec) if setup.endswith("blocks") else ():
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        return net, net, contextlib.nullcontext
    options = {"static_graph": setup == "static_graph", "find_unused_parameters": setup == "find_unused"}
    wrapped = DistributedDataParallel(net, **options)
    waits = wrapped.no_sync if setup == "no_sync" else contextlib.nullcontext
    if setup == "compiled":
        return net, torch.compile(wrapped, backend="aot_eager"), waits
    return net, wrapped, waits


def work(rank: int, folder: str) -> None:
    # A rank that waits for the other for ever would hold up all tests.
    faulthandler.dump_traceback_later(150, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    images, mask = data()
    own = list(zip(images.chunk(4)[rank::2], mask.chunk(4)[rank::2], strict=True))
    results: dict[str, Any] = {}
    for setup in SETUPS:
        if setup.startswith("FSDP2") and fully_shard is None:
            continue
        for fused in (False, True):
            net, wrapped, waits = wrap(setup)
            steps(wrapped, own, fused, waits, dist.group.WORLD)
            grads = [parameter.grad for parameter in net.parameters()]
            grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
            hooks = [len(module._forward_hooks) for module in (net.encoder, net.dec)]
            results[f"{setup}, {fused}"] = grads, hooks
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    # Without cleaning up: gloo's threads and the destructor of their group may wait for each other.
    os._exit(0)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict[str, tuple[list[Tensor], list[int]]]]:
    """What each rank computed, by setup."""
    folder = tmp_path_factory.mktemp("ranks")
    # By the path of this file: what pytest names the module, another process cannot import.
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    for rank in ranks:
        _, errors = rank.communicate()
        assert rank.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> list[Tensor]:
    """The gradients of one process with the joined parts."""
    net, (images, mask) = Net(), data()
    parts = list(zip(images.chunk(2), mask.chunk(2), strict=True))
    steps(net, parts, False, contextlib.nullcontext, None)
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("setup", SETUPS)
def test_gradients_of_tapped_ranks_are_those_of_one_process(of_ranks, alone, setup, fused):
    if setup.startswith("FSDP2") and fully_shard is None:
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    for results in of_ranks:
        grads, _ = results[f"{setup}, {fused}"]
        for grad, wanted in zip(grads, alone, strict=True):
            torch.testing.assert_close(grad, wanted)


def test_wrapping_leaves_no_hooks_of_taps_behind(of_ranks):
    left = {name: hooks for name, (_, hooks) in of_ranks[0].items() if "FSDP2 of blocks" not in name}
    assert set(map(tuple, left.values())) == {(0, 0)}


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
