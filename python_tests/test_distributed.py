"""Several processes with a part of the batch each give the loss and the gradients of one with all of it."""

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

import fdkernels as fdk

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

# How many of the four samples each rank has.
SHARES = {"two even ranks": (2, 2), "three uneven ranks": (1, 2, 1)}
CASES = {
    "none": {},
    "shuffle": {"pairing": [3, 0, 0, 2]},
    "shuffle drawn": {"seed": 3},
    "pooled": {"pairing": [[0, 3], [2, 1], [0, 1]]},
    "pooled drawn": {"domains": [0, 1, 1, 0], "seed": 3},
    "released": {"pairing": [1, 2, 3, 0]},
    "shuffle of classes": {"pairing": [3, 0, 0, 2]},
    "fisher": {},
}
CONVENTIONS = {"released": "released", "fisher": "fisher"}
EXCHANGES = {"released": "shuffle", "fisher": "none"}
CLASSES = {"shuffle of classes": {"mode": "multiclass", "num_classes": 2}}
# Plain taps, fused ones, and fused ones of a fused normalisation that has the mask before the forward.
KINDS = ("plain", "fused", "free")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        # Statistics of a sample, which do not depend on the ranks.
        self.block = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.ReLU()
        )
        with torch.no_grad():
            self.double()
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return self.block(images)


def data() -> tuple[Tensor, Tensor]:
    """Images and masks of four samples; the last counts nowhere, so that the means of the ranks differ."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 1, 6, 6, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 2, (4, 6, 6), generator=generator)
    mask[3] = 255
    return images, mask


def losses(
    net: nn.Module, images: Tensor, mask: Tensor, group: Any, kind: str = "plain"
) -> dict[str, list[Tensor]]:
    """For each case the loss, the entries, the gradients of the network, and that of α."""
    results = {}
    fused = kind != "plain"
    taps = fdk.FeatureTaps(net, ["block"], fused=fused)
    for name, case in CASES.items():
        exchange = EXCHANGES.get(name, name.split()[0])
        partners = {key: value for key, value in case.items() if key != "seed"}
        if "seed" in case:
            partners["generator"] = torch.Generator().manual_seed(case["seed"])
        convention, classes = CONVENTIONS.get(name, "paper"), CLASSES.get(name, {})
        net.zero_grad()
        early = taps.mask(mask, mask_resize="max" if name == "released" else "area", ignore_index=255)
        with early if kind == "free" else contextlib.nullcontext():
            features = net(images)
        crit = fdk.FeatureDiscrepancyLoss(
            1,
            alpha_init=0.5,
            exchange=exchange,
            convention=convention,
            ignore_index=255,
            group=group if fused else None,
            **classes,
        )
        # The group is the module's own, or that of the call.
        loss = crit(taps, mask, **partners) if fused else crit(features, mask, group=group, **partners)
        loss.backward()
        if "seed" in case:
            partners["generator"] = torch.Generator().manual_seed(case["seed"])
        entries = fdk.feature_discrepancy_loss(
            features.detach(),
            mask,
            exchange=exchange,
            convention=convention,
            ignore_index=255,
            group=group,
            reduction="none",
            **classes,
            **partners,
        )
        grads = [parameter.grad.clone() for parameter in net.parameters()]
        results[name] = [loss.detach(), entries, crit.alpha.grad, *grads]
    taps.close()
    return results


def work(rank: int, folder: str, shares: tuple[int, ...]) -> None:
    # A rank that waits for the other for ever would hold up all tests.
    faulthandler.dump_traceback_later(120, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares))
    images, mask = (part.split(shares)[rank] for part in data())
    for kind in KINDS:
        net = Net()
        if kind == "free":
            fdk.fuse_norms(net, ["block"])
        results = losses(nn.parallel.DistributedDataParallel(net), images, mask, dist.group.WORLD, kind)
        torch.save(results, Path(folder) / f"{rank}-{kind}.pt")
    dist.barrier()
    # Without cleaning up: gloo's threads and the destructor of their group may wait for each other.
    os._exit(0)


@pytest.fixture(scope="module", params=SHARES)
def shares(request) -> tuple[int, ...]:
    return SHARES[request.param]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory, shares) -> dict[str, list[dict[str, list[Tensor]]]]:
    """What each rank computed, by the kind of taps."""
    folder, world = tmp_path_factory.mktemp("ranks"), len(shares)
    # By the path of this file: what pytest names the module, another process cannot import.
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), *map(str, shares)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        _, errors = rank.communicate()
        assert rank.returncode == 0, errors
    return {kind: [torch.load(folder / f"{rank}-{kind}.pt") for rank in range(world)] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_process(of_ranks, shares, name, kind):
    loss, entries, grad_alpha, *grads = losses(Net(), *data(), group=None)[name]
    for rank, results in enumerate(of_ranks[kind]):
        rank_loss, rank_entries, rank_grad_alpha, *rank_grads = results[name]
        torch.testing.assert_close(rank_loss, loss)
        torch.testing.assert_close(rank_grad_alpha, grad_alpha)
        own = entries if name == "released" else entries.split(shares)[rank]
        torch.testing.assert_close(rank_entries, own)
        for rank_grad, grad in zip(rank_grads, grads, strict=True):
            torch.testing.assert_close(rank_grad, grad, rtol=1e-9, atol=1e-10)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3:])))
