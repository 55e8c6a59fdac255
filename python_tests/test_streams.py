"""Streams, graphs and devices other than the first: the kernels run where torch's current stream says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fdkernels as fdk
from fdkernels.op.stream import current_stream

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

# Long enough for the host to queue a call behind it: 0.1 s and less.
_PAUSE_CYCLES = 100_000_000

# Calls with different kernels: two regions, shuffled pairs, classes, second moments.
OPTIONS = {
    "plain": {},
    "shuffled": {"exchange": "shuffle", "pairing": torch.tensor([1, 0])},
    "classes": {"mode": "multiclass", "num_classes": 3},
    "fisher": {"convention": "fisher"},
}


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """The backends of a GPU in turn."""
    if reason := fdk.backends()[request.param]:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, object]:
    """Options of the loss, on the GPU."""
    chosen = OPTIONS[request.param]
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in chosen.items()}


def features_and_mask(seed: int, classes: int) -> tuple[list[Tensor], Tensor]:
    """Two layers [2, C, H, W] and a mask [2, 1, 24, 20], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(shape, generator=generator) for shape in ((2, 5, 24, 20), (2, 70, 6, 5))]
    return layers, torch.randint(classes, (2, 1, 24, 20), generator=generator).float()


def number_of_values(options: dict[str, object]) -> int:
    """Of the mask."""
    return int(options.get("num_classes", 2))


def expected(layers: list[Tensor], mask: Tensor, options: dict[str, object]) -> list[Tensor]:
    """Loss and gradients by the reference, on the CPU."""
    leaves = [layer.detach().cpu().requires_grad_() for layer in layers]
    there = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = fdk.feature_discrepancy_loss(leaves, mask.cpu(), backend="reference", **there)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(found: list[Tensor], right: list[Tensor]) -> None:
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-5)


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    """A stream that is not the default one, current within the test."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def test_kernels_are_launched_on_the_stream_that_torch_names(stream):
    device = torch.device("cuda", torch.cuda.current_device())
    assert current_stream(device) == torch.cuda.current_stream(device).cuda_stream == stream.cuda_stream


def test_a_call_waits_for_the_current_stream(gpu_backend, options, stream):
    layers, mask = features_and_mask(0, number_of_values(options))
    there = [torch.full_like(layer, torch.nan, device="cuda", requires_grad=True) for layer in layers]
    mask_there = torch.zeros_like(mask, device="cuda")
    sources = [layer.cuda() for layer in layers], mask.cuda()
    fdk.feature_discrepancy_loss(there, mask_there, backend=gpu_backend, **options)  # compiles
    torch.cuda.synchronize()

    # A kernel on another stream would run within the pause and read NaN.
    torch.cuda._sleep(_PAUSE_CYCLES)
    with torch.no_grad():
        for target, source in zip([*there, mask_there], [*sources[0], sources[1]], strict=True):
            target.copy_(source)
    loss = fdk.feature_discrepancy_loss(there, mask_there, backend=gpu_backend, **options)
    loss.backward()
    stream.synchronize()
    assert_close([loss.detach(), *(leaf.grad for leaf in there)], expected(layers, mask, options))


def test_backward_waits_for_the_gradient_that_arrives(gpu_backend, stream):
    layers, mask = features_and_mask(1, 2)
    leaves = [layer.cuda().requires_grad_() for layer in layers]
    arrives = torch.full((), torch.nan, device="cuda")
    one = torch.ones((), device="cuda")
    loss = fdk.feature_discrepancy_loss(leaves, mask.cuda(), backend=gpu_backend)
    loss.backward(one, retain_graph=True)  # compiles
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda._sleep(_PAUSE_CYCLES)
    arrives.copy_(one)
    loss.backward(arrives)
    stream.synchronize()
    assert_close([loss.detach(), *(leaf.grad for leaf in leaves)], expected(layers, mask, {}))


def captured(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of a step, and the tensors that its replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def test_a_captured_graph_computes_anew(gpu_backend, options):
    layers, mask = features_and_mask(2, number_of_values(options))
    leaves = [layer.cuda().requires_grad_() for layer in layers]
    mask_there = mask.cuda()

    def step() -> list[Tensor]:
        loss = fdk.feature_discrepancy_loss(leaves, mask_there, backend=gpu_backend, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    graph, out = captured(step)
    for seed in (3, 4):
        layers, mask = features_and_mask(seed, number_of_values(options))
        with torch.no_grad():
            for target, source in zip([*leaves, mask_there], [*layers, mask], strict=True):
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, expected(layers, mask, options))


def test_taps_in_a_captured_graph(gpu_backend):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()).cuda()
    images, mask = torch.rand(2, 3, 16, 16, device="cuda"), torch.rand(2, 1, 16, 16, device="cuda") > 0.5
    weight = network[0].weight

    def step() -> list[Tensor]:
        with fdk.FeatureTaps(network, ["1"]) as taps:
            out = network(images)
            loss = fdk.feature_discrepancy_loss(taps, mask, backend=gpu_backend) + out.mean()
        return [loss.detach(), *torch.autograd.grad(loss, [weight])]

    graph, out = captured(step)
    with torch.no_grad():
        images.uniform_()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.clone() for tensor in out]
    assert_close(replayed, [tensor.cpu() for tensor in step()])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds one CUDA device alone")
def test_a_call_runs_on_the_device_of_its_tensors(gpu_backend, options):
    layers, mask = features_and_mask(5, number_of_values(options))
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    assert torch.cuda.current_device() != last.index
    leaves = [layer.to(last).requires_grad_() for layer in layers]
    there = {name: value.to(last) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = fdk.feature_discrepancy_loss(leaves, mask.to(last), backend=gpu_backend, **there)
    loss.backward()
    assert loss.device == last
    assert torch.cuda.current_device() != last.index
    assert_close([loss.detach(), *(leaf.grad for leaf in leaves)], expected(layers, mask, options))
