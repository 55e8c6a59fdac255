"""FeatureTaps in the ways people train: what torch offers around a network gives the gradients without it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fdkernels as fdk

NAMES = ("encoder:0", "encoder:1", "dec")
both = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x).relu()
        return fine, self.deep(fine).relu()


class Net(nn.Module):
    """An encoder that returns a tuple, and a decoder; the encoder can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.dec, self.head = nn.Conv2d(10, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        run = self.encoder
        fine, deep = checkpoint(run, x, use_reentrant=False) if self.checkpoints else run(x)
        up = nn.functional.interpolate(deep, scale_factor=2)
        return self.head(self.dec(torch.cat([fine, up], 1)))


def batch(n: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, size, size), torch.rand(n, size, size) > 0.5


def total(net: Any, taps: fdk.FeatureTaps, fused: bool, images: Tensor, mask: Tensor) -> Tensor:
    out = net(images)
    loss = fdk.feature_discrepancy_loss(taps if fused else taps.features, mask, eps=0.1)
    return out.square().mean() + loss


def gradients(net: nn.Module, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Those of plain taps without anything around the network."""
    with fdk.FeatureTaps(net, NAMES) as taps:
        return torch.autograd.grad(total(net, taps, False, images, mask), list(net.parameters()))


def check_gradients(net: nn.Module, wanted: tuple[Tensor, ...]) -> None:
    for parameter, grad in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    net.zero_grad()


@both
def test_a_compiled_network_of_changing_sizes(fused):
    net = Net()
    torch.compiler.reset()
    fast = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    with fdk.FeatureTaps(fast, NAMES, fused=fused) as taps:
        for n, size in ((3, 8), (2, 12), (4, 16)):
            images, mask = batch(n, size)
            total(fast, taps, fused, images, mask).backward()
            wanted = gradients(copy.deepcopy(net), images, mask)
            check_gradients(net, wanted)
    torch.compiler.reset()


@both
def test_a_scaler_of_half_precision(fused):
    net = Net()
    images, mask = batch()
    wanted = gradients(net, images, mask)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps, torch.autocast("cpu", torch.float16):
        loss = total(net, taps, fused, images, mask)
        assert {features.dtype for features in taps.features} == {torch.float16}
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for parameter, grad in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0.02, atol=0.02)
    scaler.step(optimizer)
    scaler.update()
    # A gradient that overflows is noticed, and the step is skipped.
    with torch.no_grad():
        net.head.weight.fill_(float("inf"))
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        scaler.scale(total(net, taps, fused, images, mask)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 64


@both
def test_checkpointing_of_a_submodule_that_returns_a_tuple(fused):
    net, (images, mask) = Net(), batch()
    wanted = gradients(net, images, mask)
    net.checkpoints = True
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        for _ in range(2):
            total(net, taps, fused, images, mask).backward()
            check_gradients(net, wanted)


@both
def test_accumulation_over_parts_is_the_sum_of_their_gradients(fused):
    net, parts = Net(), [batch(2), batch(3)]
    wanted = tuple(map(sum, zip(*(gradients(net, *part) for part in parts), strict=True)))
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        # The second forward may come before the first backward.
        losses = [total(net, taps, fused, *part) for part in parts]
        for loss in losses:
            loss.backward()
    check_gradients(net, wanted)


@both
def test_parameters_of_a_functional_call_get_the_gradients(fused):
    net, (images, mask) = Net(), batch()
    wanted = gradients(net, images, mask)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        out = torch.func.functional_call(net, parameters, (images,))
        loss = fdk.feature_discrepancy_loss(taps if fused else taps.features, mask, eps=0.1)
        grads = torch.autograd.grad(out.square().mean() + loss, list(parameters.values()))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other)


@both
def test_a_network_that_was_tapped_can_be_exported(fused):
    net, (images, mask) = Net(), batch()
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        total(net, taps, fused, images, mask).backward()
    exported = torch.export.export(net, (images,))
    torch.testing.assert_close(exported.module()(images), net(images))
    assert "fdkernels" not in str(exported.graph)


@both
def test_inference_mode_has_features_and_a_loss_and_no_gradient(fused):
    net, (images, mask) = Net(), batch()
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        wanted = total(net, taps, fused, images, mask)
        with torch.inference_mode():
            got = total(net, taps, fused, images, mask)
        assert not got.requires_grad
        assert torch.equal(got, wanted)
        total(net, taps, fused, images, mask).backward()  # and training goes on


@both
def test_threads_with_a_network_each_do_not_meet(fused):
    work = [(Net(), *batch(n, size)) for n, size in ((2, 8), (3, 12), (4, 16), (2, 20))]
    wanted = [gradients(*each) for each in work]
    ready = threading.Barrier(len(work))

    def train(index: int) -> None:
        net, images, mask = work[index]
        ready.wait(timeout=30)
        with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
            for _ in range(8):
                total(net, taps, fused, images, mask).backward()
                check_gradients(net, wanted[index])

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(train, index) for index in range(len(work))]:
            done.result(timeout=120)


class Samples(Dataset):
    """Holds the tapped network and computes a loss of its own in the worker."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.images, self.mask = batch(4)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        images, mask = self.images[index : index + 1], self.mask[index : index + 1]
        with torch.no_grad():
            loss = fdk.feature_discrepancy_loss(self.net.encoder(images)[0], mask, eps=0.1)
        return images[0], mask[0], loss


@both
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_workers_that_fork_after_use_work_and_leave_the_taps_alone(fused):
    net = Net()
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        total(net, taps, fused, *batch()).backward()
        before = taps.features
        samples = Samples(net)
        loader = DataLoader(samples, batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=60)
        losses = []
        for images, mask, losses_of_worker in loader:
            losses += losses_of_worker.tolist()
            assert torch.isfinite(total(net, taps, fused, images, mask))
        assert len(before) == 3
    with torch.no_grad():
        features = net.encoder(samples.images)[0]
        for index, loss in enumerate(losses):
            one = fdk.feature_discrepancy_loss(
                features[index : index + 1], samples.mask[index : index + 1], eps=0.1
            )
            assert loss == pytest.approx(one.item(), rel=1e-4)


@both
def test_an_average_of_a_tapped_network_is_tapped_by_itself(fused):
    net, (images, mask) = Net(), batch()
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        total(net, taps, fused, images, mask)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        average.update_parameters(net)
        with fdk.FeatureTaps(average, NAMES, fused=fused) as others:
            wanted = total(net, taps, fused, images, mask)
            torch.testing.assert_close(total(average, others, fused, images, mask), wanted)


def test_weight_decay_leaves_alpha_alone():
    net, (images, mask) = Net(), batch()
    crit = fdk.FeatureDiscrepancyLoss(3, "descent", alpha_init=0.5)
    groups = [{"params": net.parameters()}, *crit.parameter_groups(lr=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    before = net.dec.weight.detach().clone()
    with fdk.FeatureTaps(net, NAMES) as taps:
        net(images)
        crit(taps, mask).backward()
    optimizer.step()
    assert torch.equal(crit.alpha, torch.full((3,), 0.5))
    assert not torch.equal(net.dec.weight, before)
    plain = torch.optim.AdamW(crit.parameters(), lr=0.1, weight_decay=0.5)
    crit.alpha.grad = torch.zeros(3)
    plain.step()
    assert (crit.alpha < 0.5).all()


class Tag:
    """An object that can be referred to weakly."""


@both
@pytest.mark.parametrize("ends", ["a new pass", "clear", "close and delete", "an error in the pass"])
def test_no_graph_is_kept_from_step_to_step(fused, ends):
    net, (images, mask) = Net(), batch()
    taps = fdk.FeatureTaps(net, NAMES, fused=fused)
    loss = total(net, taps, fused, images, mask)
    gone = [weakref.ref(features) for features in taps.features]
    for features in taps.features:  # what a node of the graph holds lives as long as the graph
        tag = Tag()
        features.grad_fn.metadata["tag"] = tag
        gone.append(weakref.ref(tag))
    del loss, features, tag
    if ends == "a new pass":
        with torch.no_grad():
            net(images)
    elif ends == "clear":
        taps.clear()
    elif ends == "close and delete":
        taps.close()
        del taps
    else:
        with pytest.raises(RuntimeError, match="channels"):
            net(images[:, [0, 0]])
    gc.collect()
    assert [each() for each in gone] == [None] * 6
    assert ends != "close and delete" or not any(module._forward_hooks for module in net.modules())


@both
def test_memory_does_not_grow_with_the_steps(fused):
    net, (images, mask) = Net(), batch()
    crit = fdk.FeatureDiscrepancyLoss(3, alpha_init=0.5)

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    counts = []
    with fdk.FeatureTaps(net, NAMES, fused=fused) as taps:
        for _ in range(4):
            out = net(images)
            (out.mean() + crit(taps if fused else taps.features, mask)).backward()
            del out
            counts.append(count())
    assert counts[1] == counts[2] == counts[3]
