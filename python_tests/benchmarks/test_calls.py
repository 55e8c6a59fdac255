from __future__ import annotations

import pytest
import torch

from benchmarks import calls, cases, peers
from benchmarks.calls import Setup, chosen_cases, does_not_fit, host_samples, quartiles, summarize
from benchmarks.cases import Case, Inputs, named_case
from benchmarks.peers import Truth
from fdkernels import backends

SMALL = [case.shrunk() for case in chosen_cases("cpu", ("full",)) if case.dtype == torch.float32]

needs_extension = pytest.mark.skipif(
    backends()["cpu"] is not None, reason=f"backend cpu: {backends()['cpu']}"
)


def two_pixels(**options):
    """Features 3 and 1, the first pixel foreground."""
    case = Case("two", ((1, 1, 1, 2),), (1, 2), torch.float32, "contiguous", "cpu", **options)
    layers = [torch.tensor([[[[3.0, 1.0]]]], requires_grad=True)]
    return case, Inputs(layers, torch.tensor([[[[1.0, 0.0]]]]))


@needs_extension
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_everyone_agrees_with_the_truth(case):
    assert {"op", "eager", "floor"} <= Setup(case, compiled=False).functions("forward").keys()


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_tap_agree_with_the_truth(dtype, layout):
    ready = Setup(named_case("pyramid-32", dtype, layout, "cpu"), compiled=False)
    for mode in calls.modes(ready.case):
        for function in ready.functions(mode).values():
            function()


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("name", ["enc1-128", "pyramid-32", "ignore-256", "released-256"])
def test_compiled_agrees_with_the_truth(name):
    ready = Setup(named_case(name, torch.float32, "contiguous", "cpu").shrunk())
    ready.functions("forward+backward")
    assert "compiled" in ready.losses or "compiled" in ready.left_out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_everyone_agrees_with_the_truth_on_cuda():
    for case in chosen_cases("cuda", ("core",)):
        Setup(case.shrunk(), compiled=False).functions("forward")


@needs_extension
def test_a_wrong_peer_is_named_and_nothing_is_timed(monkeypatch):
    right = peers.two_column_bmm
    monkeypatch.setattr(peers, "two_column_bmm", lambda *inputs: 1.01 * right(*inputs))
    ready = Setup(SMALL[0], compiled=False)
    with pytest.raises(AssertionError, match=r"loss of bmm is wrong for unet-512-float32-cont"):
        ready.measure(None, "forward", budget=0)


@needs_extension
@pytest.mark.parametrize("function", ["forward", "backward"])
def test_a_wrong_kernel_is_named(monkeypatch, function):
    right = cases.kernels_of

    def wrong(*arguments):
        kernels = right(*arguments)
        return kernels._replace(**{function: broken(getattr(kernels, function))})

    def broken(call):
        return lambda: [2 * gradient for gradient in call()] if function == "backward" else 2 * call()

    monkeypatch.setattr(cases, "kernels_of", wrong)
    with pytest.raises(AssertionError, match=f"kernel {function} is wrong"):
        Setup(SMALL[0], compiled=False).functions("kernel forward")


@needs_extension
def test_a_tap_that_drops_the_gradient_of_the_network_is_named(monkeypatch):
    def without_upstream(self):
        peers.clear_gradients(self.layers)
        peers.fdkernels.feature_discrepancy_loss(self.layers, self.mask, **self.options).backward()

    monkeypatch.setattr(peers.Tapped, "tap", without_upstream)
    with pytest.raises(AssertionError, match="gradient of tap is wrong"):
        Setup(SMALL[0], compiled=False).functions("tap")


def test_the_truth_of_two_pixels_is_that_by_hand():
    truth = Truth(*two_pixels())
    # f = 3/2, b = 1/2, L = -log(1) = 0; dL/df = -2 (f - b) / D = -2, so dL/dF = -1 and +1.
    assert truth.loss == pytest.approx(0, abs=1e-9)
    assert truth.gradient_error([torch.tensor([[[[-1.0, 1.0]]]])]) < 1e-9
    assert truth.gradient_error([torch.tensor([[[[1.0, 1.0]]]])]) == pytest.approx(2**0.5)
    assert truth.gradient_error([None]) == float("inf")
    upstream = [torch.tensor([[[[5.0, 5.0]]]])]
    assert truth.gradient_error([torch.tensor([[[[4.0, 6.0]]]])], upstream) < 1e-9


def test_the_truth_of_the_released_convention_is_that_by_hand():
    truth = Truth(*two_pixels(convention="released"))
    # f = 3/2, b = mean of y·(1-F) = -1, D = (5/2)², L = -log(5/2).
    # dL/df = -2 (f - b) / D = -4/5, so dL/dF = -2/5 where y = 1 and 0 elsewhere.
    assert truth.loss == pytest.approx(-0.9162907318741551)
    assert truth.gradient_error([torch.tensor([[[[-0.4, 0.0]]]])]) < 1e-7


def test_a_case_that_does_not_fit_is_left_out_with_the_reason(monkeypatch, tmp_path):
    case = named_case("scaling-512", torch.float32, "contiguous", "cpu")
    monkeypatch.setattr(calls, "MEMORY", tmp_path / "meminfo")
    calls.MEMORY.write_text(f"MemTotal: 9 kB\nMemAvailable: {4 * 2**20} kB\n")
    assert does_not_fit(case) is None
    calls.MEMORY.write_text(f"MemTotal: 9 kB\nMemAvailable: {2 * 2**20} kB\n")
    assert does_not_fit(case) == "3.5 GiB are needed for scaling-512, 2 GiB are free"


@needs_extension
def test_a_contender_without_memory_is_left_out_with_the_reason(monkeypatch):
    def too_large(*inputs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(peers, "two_column_bmm", too_large)
    ready = Setup(SMALL[0], compiled=False)
    assert ready.left_out["bmm"] == "too little memory for unet-512"
    assert "bmm" not in ready.functions("forward")


class FakeBenchmark:
    """Does rounds as pytest-benchmark does, without a clock."""

    disabled = True

    def pedantic(self, target, args, setup, rounds):
        for _ in range(rounds):
            setup()
            target(*args)


def test_a_round_calls_everyone_alike():
    called = {"op": 0, "eager": 0, "floor": 0}

    def call(name):
        called[name] += 1

    functions = {name: lambda name=name: call(name) for name in called}
    assert host_samples(FakeBenchmark(), functions, "cpu", budget=0) == {}
    assert len(set(called.values())) == 1
    # Twice to choose the number of rounds, then once untimed and once timed in each.
    assert called["op"] == 2 + 2 * calls.MIN_ROUNDS


def test_ratios_are_those_of_the_same_round():
    samples = {"op": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]}
    seconds, ratios = summarize(samples, [("eager", "op")])
    assert seconds["op"] == {"median": 2.0, "q1": 1.5, "q3": 3.0}
    assert ratios == {"eager/op": {"median": 3.0, "q1": 3.0, "q3": 3.0}}


def test_quartiles_keep_five_digits():
    assert quartiles([0.000123456789] * 3)["median"] == 0.00012346
