from __future__ import annotations

import pytest
import torch

from benchmarks import memory, peers, prepared
from benchmarks.case_sets import cases
from benchmarks.cases import Case, Inputs, named_case
from benchmarks.memory import dispatched_ops, does_not_fit, peak_bytes
from benchmarks.prepared import Prepared
from benchmarks.timing import Rounds, quartiles, summarize
from benchmarks.truth import Truth
from fdkernels import backends

SMALL = [case.shrunk() for case in cases("cpu", ("full",)) if case.dtype == torch.float32]

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
    ready = Prepared(case, compiled=False)
    ready.require_agreement()
    assert {"op", "eager"} <= ready.errors.keys()


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_tap_agree_with_the_truth(dtype, layout):
    ready = Prepared(named_case("pyramid-32", dtype, layout, "cpu"), compiled=False)
    assert ready.kernels.backend == "cpu"
    assert ready.tapped.errors().keys() == {"tap", "separate"}


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("name", ["enc1-128", "pyramid-32", "ignore-256", "released-256"])
def test_compiled_agrees_with_the_truth(name):
    ready = Prepared(named_case(name, torch.float32, "contiguous", "cpu").shrunk())
    ready.require_agreement()
    assert "compiled" in ready.losses or "compiled" in ready.left_out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_everyone_agrees_with_the_truth_on_cuda():
    for case in cases("cuda", ("core",)):
        Prepared(case.shrunk(), compiled=False).require_agreement()


@needs_extension
def test_a_wrong_peer_is_named_and_nothing_is_timed(monkeypatch):
    right = peers.two_column_bmm
    monkeypatch.setattr(peers, "two_column_bmm", lambda *inputs: 1.01 * right(*inputs))
    ready = Prepared(SMALL[0], compiled=False)
    with pytest.raises(AssertionError, match=r"loss of bmm is wrong for unet-512-float32-cont"):
        ready.measure(None, "forward", ready.losses, budget=0)


@needs_extension
def test_a_wrong_kernel_is_named(monkeypatch):
    monkeypatch.setattr(prepared.Kernels, "forward", lambda self: (2 * self.grad_sums, None))
    with pytest.raises(AssertionError, match="kernel forward is wrong"):
        _ = Prepared(SMALL[0], compiled=False).kernels


@needs_extension
def test_a_tap_that_drops_the_gradient_of_the_network_is_named(monkeypatch):
    def without_upstream(self):
        prepared.clear_gradients(self.layers)
        peers.fdkernels.feature_discrepancy_loss(self.layers, self.mask, **self.options).backward()

    monkeypatch.setattr(prepared.Tapped, "tap", without_upstream)
    with pytest.raises(AssertionError, match="gradient of tap is wrong"):
        _ = Prepared(SMALL[0], compiled=False).tapped


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


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, about what it cannot trace here
def test_peak_memory_is_what_is_alive_at_once():
    def two_at_once_of_three():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return second, torch.zeros(10)

    assert peak_bytes(two_at_once_of_three, "cpu") == pytest.approx(8_000_000, abs=100)


def test_ops_are_counted_where_torch_dispatches_them():
    x = torch.ones(3)
    assert dispatched_ops(lambda: x + 1) == 1
    assert dispatched_ops(lambda: (x * x).exp().sum()) == 3


def test_a_contender_that_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    case = named_case("scaling-512", torch.float32, "contiguous", "cpu")
    monkeypatch.setattr(memory, "_available_bytes", lambda: 2 * 2**30)
    assert does_not_fit(case) is None
    assert does_not_fit(case, "eager") == "3.5 GiB are needed for scaling-512, 2 GiB are free"


class FakeBenchmark:
    """Does rounds as pytest-benchmark does, without a clock."""

    disabled = True

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def test_a_round_times_everyone_once():
    calls = {"op": 0, "eager": 0, "floor": 0}

    def call(name):
        calls[name] += 1

    functions = {name: lambda name=name: call(name) for name in calls}
    rounds = Rounds(functions, "op", "cpu")
    assert rounds.run(FakeBenchmark(), budget=0) == {}
    assert len(rounds.samples["eager"]) == len(rounds.samples["floor"])
    assert len(set(calls.values())) == 1


def test_ratios_are_those_of_the_same_round():
    samples = {"op": [1.0, 2.0, 4.0], "eager": [3.0, 6.0, 12.0]}
    seconds, ratios = summarize(samples, [("eager", "op")])
    assert seconds["op"] == {"median": 2.0, "q1": 1.5, "q3": 3.0}
    assert ratios == {"eager/op": {"median": 3.0, "q1": 3.0, "q3": 3.0}}


def test_quartiles_keep_five_digits():
    assert quartiles([0.000123456789] * 3)["median"] == 0.00012346
