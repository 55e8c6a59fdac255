"""FeatureTaps: what is read is of one forward pass, or an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fdkernels as fdk


class Times(nn.Module):
    """Multiplies by a number, so that features are worked out by hand."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Net(nn.Module):
    """An encoder, a cell that runs `times` times, and a decoder that can be skipped or can fail."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.enc, self.cell, self.dec = Times(2.0), Times(3.0), Times(5.0)
        self.times = times
        self.skips = self.fails = self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.enc(x)
        for _ in range(self.times):
            x = checkpoint(self.cell, x, use_reentrant=False) if self.checkpoints else self.cell(x)
        if self.fails:
            raise OverflowError("the forward fails")
        return x if self.skips else self.dec(x)


class Held(nn.Module):
    """As a LightningModule holds a network: its own forward is not what the loop calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


ONE = torch.ones(1, 1, 2, 2)
ALL = ("enc", "cell", "dec")
both = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def values(taps: fdk.FeatureTaps) -> list[float]:
    return [features.flatten()[0].item() for features in taps.features]


@both
def test_a_module_that_runs_several_times_is_refused_by_name_and_count(fused):
    net = Net(times=3)
    with fdk.FeatureTaps(net, ALL, fused=fused) as taps:
        net(ONE)
        message = (
            r"must run once in a forward pass, but 'cell' ran 3 times; with calls='last' .* calls='all' each"
        )
        with pytest.raises(RuntimeError, match=message):
            _ = taps.features
        with pytest.raises(RuntimeError, match="'cell' ran 3 times"):
            fdk.feature_discrepancy_loss(taps, torch.rand(1, 2, 2))


@both
@pytest.mark.parametrize(("calls", "wanted"), [("last", [54, 2, 270]), ("all", [6, 18, 54, 2, 270])])
def test_calls_says_what_is_kept_of_a_module_that_runs_several_times(fused, calls, wanted):
    net = Net(times=3)
    with fdk.FeatureTaps(net, ("cell", "enc", "dec"), fused=fused, calls=calls) as taps:
        for _ in range(2):
            net(ONE)
            assert values(taps) == wanted


@pytest.mark.parametrize("calls", ["last", "all"])
def test_fused_taps_of_several_calls_have_the_gradients_of_plain_ones(calls):
    images, mask = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4)
    results = []
    for fused in (False, True):
        net = Net(times=3)
        crit = fdk.FeatureDiscrepancyLoss(5 if calls == "all" else 3, alpha_init=0.5, eps=0.1)
        with fdk.FeatureTaps(net, ALL, fused=fused, calls=calls) as taps:
            total = net(images).square().mean()
            total = total + crit(taps if fused else taps.features, mask)
        results.append(torch.stack(torch.autograd.grad(total, list(net.parameters()))))
    torch.testing.assert_close(*results)


def test_one_module_under_two_names_runs_several_times():
    shared = Times(2.0)
    net = nn.Sequential(shared, shared)
    with fdk.FeatureTaps(net, ["1"], calls="all") as taps:
        net(ONE)
        assert values(taps) == [2, 4]


def test_unknown_calls_are_refused():
    with pytest.raises(ValueError, match="calls must be one of 'once', 'last', 'all', got 'first'"):
        fdk.FeatureTaps(Net(), ALL, calls="first")


@both
@pytest.mark.parametrize("calls", ["once", "last", "all"])
def test_a_second_forward_starts_anew_also_where_the_first_was_not_read(fused, calls):
    net = Net()
    with fdk.FeatureTaps(net, ALL, fused=fused, calls=calls) as taps:
        net(ONE)
        net(7 * ONE)
        assert values(taps) == [14, 42, 210]


@both
@pytest.mark.parametrize("calls", ["once", "last", "all"])
def test_what_checkpointing_computes_again_does_not_count(fused, calls):
    net = Net()
    net.checkpoints = True
    with fdk.FeatureTaps(net, ALL, fused=fused, calls=calls) as taps:
        for _ in range(2):
            out = net(torch.rand(2, 1, 2, 2)).sum()
            kept = taps.features
            (out + fdk.feature_discrepancy_loss(taps, torch.rand(2, 2, 2), eps=0.1)).backward()
            assert all(one is other for one, other in zip(taps.features, kept, strict=True))


@both
def test_a_module_that_a_pass_skips_is_named_and_not_served_from_the_pass_before(fused):
    net = Net()
    with fdk.FeatureTaps(net, ALL, fused=fused) as taps:
        net(ONE)
        net.skips = True
        net(ONE)
        with pytest.raises(
            RuntimeError, match=r"the last one did not run .* it skipped them; not run yet: \['dec'\]"
        ):
            _ = taps.features
        net.skips = False
        net(ONE)
        assert values(taps) == [2, 6, 30]


@both
def test_after_an_error_in_the_forward_nothing_of_the_pass_before_is_read(fused):
    net = Net()
    with fdk.FeatureTaps(net, ALL, fused=fused) as taps:
        net(ONE)
        net.fails = True
        with pytest.raises(OverflowError):
            net(7 * ONE)
        with pytest.raises(RuntimeError, match=r"it ended with an error.*; not run yet: \['dec'\]"):
            _ = taps.features
        net.fails = False
        net(7 * ONE)
        assert values(taps) == [14, 42, 210]


def test_an_error_that_is_no_exception_class_is_survived_too():
    net = Net()
    with fdk.FeatureTaps(net, ALL) as taps:
        handle = net.dec.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            net(ONE)
        handle.remove()
        net(ONE)
        assert values(taps) == [2, 6, 30]


def test_parts_that_are_called_one_by_one_make_one_pass_until_they_are_read():
    net = Net()
    with fdk.FeatureTaps(net, ALL) as taps:
        for factor in (1, 7):
            net.dec(net.cell(net.enc(factor * ONE)))
            assert values(taps) == [2 * factor, 6 * factor, 30 * factor]
            assert values(taps) == [2 * factor, 6 * factor, 30 * factor]
        net.cell(net.enc(ONE))
        with pytest.raises(
            RuntimeError, match=r"part of the network was called by itself.*not run yet: \['dec'\]"
        ):
            _ = taps.features


def test_a_part_that_is_called_twice_before_reading_is_refused_until_the_taps_are_cleared():
    net = Net()
    with fdk.FeatureTaps(net, ALL) as taps:
        net.cell(net.enc(ONE))
        net.dec(net.cell(ONE))
        with pytest.raises(
            RuntimeError, match=r"'cell' ran 2 times since the features were last read \(taps.clear"
        ):
            _ = taps.features
        net.cell(ONE)
        taps.clear()
        net.dec(net.cell(net.enc(ONE)))
        assert values(taps) == [2, 6, 30]


def test_a_part_that_is_called_after_the_whole_begins_a_new_pass():
    net = Net()
    with fdk.FeatureTaps(net, ALL) as taps:
        net(ONE)
        net.enc(7 * ONE)
        with pytest.raises(RuntimeError, match=r"not run yet: \['cell', 'dec'\]"):
            _ = taps.features


def test_a_part_that_failed_ends_the_pass_of_parts():
    net = Net()
    with fdk.FeatureTaps(net, ALL) as taps:
        net.enc(ONE)
        with pytest.raises(TypeError):
            net.cell(None)
        net.dec(net.cell(net.enc(ONE)))
        assert values(taps) == [2, 6, 30]


def test_what_holds_all_tapped_modules_begins_a_pass_although_the_network_is_not_called():
    held = Held(Net())
    with fdk.FeatureTaps(held, ["net.enc", "net.dec"]) as taps:
        for factor in (1, 7):  # as validation that reads nothing, and then a training step
            held.net(factor * ONE)
        assert values(taps) == [14, 210]
        held.net.fails = True
        with pytest.raises(OverflowError):
            held.net(ONE)
        with pytest.raises(RuntimeError, match="not run yet"):
            _ = taps.features
        held.net.fails = False
        held(ONE)
        assert values(taps) == [2, 30]


def test_a_block_that_the_network_runs_twice_is_refused_though_it_holds_all_tapped_modules():
    class Siamese(Held):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - self.net(2 * x)

    net = Siamese(Net())
    with fdk.FeatureTaps(net, ["net.enc", "net.dec"]) as taps:
        net(ONE)
        with pytest.raises(RuntimeError, match=r"'net\.enc' ran 2 times, 'net\.dec' ran 2 times; with"):
            _ = taps.features


@pytest.mark.parametrize("calls", ["once", "last", "all"])
def test_a_network_that_calls_itself_is_not_cut_silently(calls):
    class Mirrored(Net):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self(x, again=False) + self(7 * x, again=False) if again else super().forward(x)

    net = Mirrored()
    with fdk.FeatureTaps(net, ALL, calls=calls) as taps:
        net(ONE)
        if calls == "last":
            assert values(taps) == [14, 42, 210]
        else:
            with pytest.raises(RuntimeError, match="the tapped network called itself"):
                _ = taps.features
        net(ONE, again=False)
        assert values(taps) == [2, 6, 30]


def test_a_wrapper_or_what_it_wraps_may_be_called():
    class Wrapper(Held):
        def __init__(self, net: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = net

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    net = Net()
    wrapped = Wrapper(net)
    with fdk.FeatureTaps(wrapped, ALL) as taps, fdk.FeatureTaps(net, ALL) as inner:
        for call in (wrapped, net, wrapped):
            call(ONE)
            assert values(taps) == values(inner) == [2, 6, 30]
        net.fails = True
        with pytest.raises(OverflowError):
            wrapped(ONE)
        with pytest.raises(RuntimeError, match="not run yet"):
            _ = taps.features
        with pytest.raises(RuntimeError, match="not run yet"):
            _ = inner.features


def test_taps_in_a_replica_of_data_parallel_are_refused():
    net = Net()
    with fdk.FeatureTaps(net, ["enc"]):
        replica = net._replicate_for_data_parallel()
        replica._modules["enc"] = net.enc._replicate_for_data_parallel()
        replica._modules["enc"].factor = net.enc.factor
        replica._modules["enc"]._parameters["factor"] = net.enc.factor
        with pytest.raises(
            RuntimeError, match=r"taps must see the whole batch, but nn\.DataParallel runs a replica"
        ):
            replica(ONE)


def count_graphs(net: nn.Module, **options) -> tuple[nn.Module, list[int]]:
    """The network compiled from scratch, and a list that grows by one for each graph."""
    torch.compiler.reset()
    graphs: list[int] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    return torch.compile(net, backend=compiler, **options), graphs


@pytest.mark.parametrize("name", ["the compiled network", "the network"])
def test_taps_set_anew_for_each_step_compile_once(name):
    net = Net()
    fast, graphs = count_graphs(net, fullgraph=True)
    for factor in (1, 7, 9):
        with fdk.FeatureTaps(fast if name == "the compiled network" else net, ALL) as taps:
            fast(factor * ONE)
            assert values(taps) == [2 * factor, 6 * factor, 30 * factor]
    assert len(graphs) == 1


@pytest.mark.parametrize("calls", ["once", "last", "all"])
def test_calls_are_counted_in_a_compiled_network(calls):
    net = Net(times=3)
    fast, graphs = count_graphs(net, fullgraph=True)
    with fdk.FeatureTaps(fast, ALL, calls=calls) as taps:
        for _ in range(3):
            fast(ONE)
            if calls == "once":
                with pytest.raises(RuntimeError, match="'cell' ran 3 times"):
                    _ = taps.features
            else:
                assert values(taps) == ([2, 54, 270] if calls == "last" else [2, 6, 18, 54, 270])
    assert len(graphs) == 1


def test_a_compiled_block_that_runs_many_times_is_tapped_by_its_own_names_and_compiled_twice_at_most():
    net = Net(times=12).requires_grad_(False)
    net.cell, graphs = count_graphs(nn.Sequential(net.cell), fullgraph=True)
    with fdk.FeatureTaps(net, ["enc", "cell.0"], calls="last") as taps:
        net(ONE)
        assert values(taps) == [2, 2 * 3**12]
    assert len(graphs) <= 2


def test_taps_that_a_compiled_network_does_not_see_are_an_error_that_says_how():
    net = Net()
    fast, _ = count_graphs(net)
    fast(ONE)
    with fdk.FeatureTaps(fast, ALL) as taps:
        fast(ONE)
        with pytest.raises(
            RuntimeError, match=r"not run yet: .*: set taps before the first compiled call.*, or tap"
        ):
            _ = taps.features


def test_a_compiled_loss_reads_what_a_network_recorded_outside():
    net, mask = Net().requires_grad_(False), torch.rand(1, 2, 2)
    with fdk.FeatureTaps(net, ["dec"]) as taps:
        net(torch.rand(1, 1, 2, 2))
        torch.compiler.reset()
        fast = torch.compile(lambda mask: fdk.feature_discrepancy_loss(taps, mask, eps=0.1), backend="eager")
        torch.testing.assert_close(fast(mask), fdk.feature_discrepancy_loss(taps, mask, eps=0.1))
