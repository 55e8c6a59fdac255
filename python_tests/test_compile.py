"""torch.compile without a graph break: same numbers, same gradients as eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fdkernels as fdk

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
# Before it Dynamo's backward of an autograd.Function takes symbolic sizes in another order than its forward.
changing_sizes = pytest.mark.skipif(TORCH < (2, 11), reason="torch before 2.11 compiles fixed sizes alone")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], scope="session")
def compiled(request):
    """`compiled(function)`: the function in one graph."""

    def make(function):
        return torch.compile(function, backend=request.param, fullgraph=True)

    return make


def check_same(function, compiled, *inputs: Tensor) -> None:
    """Values and gradients of all inputs that ask for one, eager and compiled, twice."""
    wanted_by = [x for x in inputs if x.requires_grad]
    fast = compiled(function)
    for _ in range(2):
        torch.manual_seed(1)
        wanted = function(*inputs)
        torch.manual_seed(1)
        got = fast(*inputs)
        torch.testing.assert_close(got, wanted)
        grads = torch.autograd.grad(got.square(), wanted_by)
        expected = torch.autograd.grad(wanted.square(), wanted_by)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other)
            assert grad.stride() == other.stride()


def layers(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, c, s, s).to(dtype).requires_grad_() for c, s in ((4, 8), (6, 4))]


@pytest.mark.parametrize("convention", list(fdk.CONVENTIONS))
def test_one_layer_under_each_convention(compiled, convention):
    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, convention=convention)

    check_same(loss, compiled, layers()[0], torch.rand(3, 8, 8) > 0.5)


def test_layers_with_weights_that_ask_for_a_gradient(compiled):
    def loss(first: Tensor, second: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss([first, second], mask, layer_weights=weights)

    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    check_same(loss, compiled, *layers(), torch.rand(3, 8, 8), weights)


def test_a_soft_mask_that_asks_for_a_gradient_beside_ignored_pixels(compiled):
    mask = torch.rand(3, 8, 8)
    mask[:, :2] = -1

    def loss(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss([first, second], mask, ignore_index=-1)

    check_same(loss, compiled, *layers(), mask.requires_grad_())


def test_a_random_shuffle(compiled):
    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, exchange="shuffle")

    features, mask = layers()[0], torch.rand(3, 8, 8)
    fast = compiled(loss)
    # Inductor has random numbers of its own, so the value is one of those that eager can give.
    got = {round(fast(features, mask).item(), 4) for _ in range(8)}
    possible = {round(loss(features, mask).item(), 4) for _ in range(80)}
    assert got <= possible
    assert len(got) > 1


@pytest.mark.parametrize("exchange", ["shuffle", "pooled"])
def test_given_partners(compiled, exchange):
    pairing = torch.tensor([1, 2, 0] if exchange == "shuffle" else [[0, 1], [2, 1]])

    def loss(features: Tensor, mask: Tensor, pairing: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, exchange=exchange, pairing=pairing)

    check_same(loss, compiled, layers()[0], torch.rand(3, 8, 8), pairing)


def test_pairs_drawn_from_domains(compiled):
    def loss(features: Tensor, mask: Tensor, domains: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, exchange="pooled", domains=domains)

    # With one novel sample all base samples meet it, whatever is drawn.
    check_same(loss, compiled, layers()[0], torch.rand(3, 8, 8), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignore_index", [None, 1])
def test_layers_of_one_size_share_their_weights(compiled, ignore_index, reduction):
    def loss(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> Tensor:
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return fdk.feature_discrepancy_loss([first, second, third], mask, **options).sum()

    same = torch.randn(3, 2, 8, 8, requires_grad=True)
    check_same(loss, compiled, *layers(), same, torch.randint(0, 2, (3, 8, 8)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_tap(compiled, channels_last):
    def through(features: Tensor, mask: Tensor) -> Tensor:
        out, loss = fdk.tap(features, mask)
        return loss + out.sin().sum()

    features = layers()[0].detach()
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    check_same(through, compiled, features.requires_grad_(), torch.rand(3, 8, 8))


def test_tap_of_several_layers_of_which_one_is_used(compiled):
    def through(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        outs, loss = fdk.tap([first, second], mask)
        return loss + outs[1].square().sum()

    check_same(through, compiled, *layers(), torch.rand(3, 8, 8))


def test_region_sums(compiled):
    def total(features: Tensor, mask: Tensor) -> Tensor:
        sums = fdk.region_sums(features, mask, mask_resize="nearest")
        return (sums.fg * sums.bg).sum() + sums.fg_mass.sum()

    check_same(total, compiled, layers()[0], torch.rand(3, 16, 16))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_named_backend(compiled, name):
    if fdk.backends()[name] is not None:
        pytest.skip(f"backend {name!r}: {fdk.backends()[name]}")

    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, backend=name)

    check_same(loss, compiled, layers()[0], torch.rand(3, 8, 8))


def test_half_precision(compiled):
    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask)

    check_same(loss, compiled, layers(torch.bfloat16)[0], torch.rand(3, 8, 8))


def number_of_ops(graph: torch.fx.GraphModule) -> int:
    """How many ops of the package a graph holds."""
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return sum(str(target).startswith("fdkernels.") for target in targets)


@pytest.mark.parametrize("tapped", [False, True], ids=["loss", "tap"])
@pytest.mark.parametrize("resized", [False, True], ids=["mask as it is", "mask resized"])
def test_a_compiled_graph_holds_one_op_beside_the_masks_and_fuses_the_gradient(resized, tapped):
    graphs = []

    def keep(graph, inputs):
        graphs.append(number_of_ops(graph))
        return make_boxed_func(graph)

    def loss(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        if not tapped:
            return fdk.feature_discrepancy_loss([first, second], mask)
        outs, value = fdk.tap([first, second], mask)
        return value + outs[1].sum()

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    features = layers() if resized else [layers()[0], torch.randn(3, 2, 8, 8, requires_grad=True)]
    torch.compile(loss, backend=backend, fullgraph=True)(*features, torch.rand(3, 8, 8) > 0.5).backward()
    assert graphs == [2 if resized else 1, 0]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("how", ["no gradient asked for", "no_grad", "inference_mode"])
def test_evaluation(compiled, how, ignore_index, num_layers):
    def entries(mask: Tensor, *features: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, ignore_index=ignore_index, reduction="none")

    asked = how == "no_grad"
    features = [torch.randn(3, 4, 8, 8, requires_grad=asked) for _ in range(num_layers)]
    mask = torch.randint(0, 2, (3, 8, 8))
    without = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, nullcontext)
    with without():
        got = compiled(entries)(mask, *features)
    torch.testing.assert_close(got, entries(mask, *features))


@changing_sizes
@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_loss_of_a_wrong_mask_is_nan_where_a_graph_checks_no_values(compiled, backend, mask_dtype):
    if reason := fdk.backends()[backend]:
        pytest.skip(reason)

    def loss(features: list[Tensor], mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, backend=backend)

    binary = (torch.arange(3 * 64).view(3, 8, 8) % 7 < 3).to(mask_dtype)
    void, classes = binary.clone(), binary.clone()
    void[1, 2, 5:7], classes[2, 4, 4] = 255, 2
    fast = compiled(loss)
    wanted = fast(layers(), binary)
    assert wanted.isfinite()
    for wrong in (binary * 255, void, classes):
        for features in (layers(), layers()[:1], layers()[1:]):
            made = fast(features, wrong)
            assert made.isnan()
            assert all(grad.isnan().any() for grad in torch.autograd.grad(made, features))


@changing_sizes
def test_sizes_may_change_from_call_to_call(compiled):
    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask, reduction="sum")

    fast = compiled(loss)
    for N, C, s in ((2, 3, 4), (3, 3, 6), (4, 5, 10), (5, 5, 7)):
        features, mask = torch.randn(N, C, s, s, requires_grad=True), torch.rand(N, s, s)
        torch.testing.assert_close(fast(features, mask), loss(features, mask))
        (grad,) = torch.autograd.grad(fast(features, mask), features)
        torch.testing.assert_close(grad, torch.autograd.grad(loss(features, mask), features)[0])


def test_bad_input_is_refused_while_compiling(compiled):
    def loss(features: Tensor, mask: Tensor) -> Tensor:
        return fdk.feature_discrepancy_loss(features, mask)

    # torch 2.8 names the kind of error alone, torch 2.6 says that there was one.
    message = "mask must have the batch size of the features, 3, got 2|ExceptionVariable.*ValueError|Observed"
    with pytest.raises(Exception, match=message):
        compiled(loss)(layers()[0], torch.rand(2, 8, 8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Conv2d(1, 4, 3, padding=1)
        self.enc2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Conv2d(6, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.enc2(self.enc1(images).relu()))


def test_a_training_step_with_taps_and_the_criterion(compiled):
    net, crit = Net(), fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5)
    images, mask = torch.randn(3, 1, 8, 8), torch.rand(3, 8, 8)
    parameters = [*net.parameters(), *crit.parameters()]
    with fdk.FeatureTaps(net, ["enc1", "enc2"]) as taps:

        def step(images: Tensor, mask: Tensor) -> Tensor:
            logits = net(images)
            return logits.square().mean() + crit(taps.features, mask)

        wanted = step(images, mask)
        expected = torch.autograd.grad(wanted, parameters)
        got = compiled(step)(images, mask)
        torch.testing.assert_close(got, wanted)
        for grad, other in zip(torch.autograd.grad(got, parameters), expected, strict=True):
            torch.testing.assert_close(grad, other)


def maps_put_out(make_loss: Callable[[fdk.FeatureTaps, Tensor], Tensor]) -> int:
    """How many feature maps the compiled graph of a network and its loss puts out."""
    found = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        found.append(sum(node.meta["example_value"].dim() == 4 for node in output.args[0]))
        return graph

    net = Net()
    with fdk.FeatureTaps(net, ["enc1", "enc2"]) as taps:

        def step(images: Tensor, mask: Tensor) -> Tensor:
            return net(images).square().mean() + make_loss(taps, mask)

        torch.compile(step, backend=keep, fullgraph=True)(torch.randn(3, 1, 8, 8), torch.rand(3, 8, 8))
    return found[-1]


def test_a_graph_does_not_put_out_the_features_of_a_loss_that_takes_the_taps():
    assert maps_put_out(fdk.feature_discrepancy_loss) == 0
    assert maps_put_out(fdk.FeatureDiscrepancyLoss(2, alpha_init=0.5)) == 0
    frozen = fdk.FeatureDiscrepancyLoss(2, active=False)
    assert maps_put_out(frozen) == 0
    assert maps_put_out(lambda taps, mask: fdk.feature_discrepancy_loss(taps.features, mask)) == 2


def test_features_that_a_compiled_loss_let_go_of_cannot_be_read_until_the_next_pass():
    net, images, mask = Net(), torch.randn(3, 1, 8, 8), torch.rand(3, 8, 8)
    with fdk.FeatureTaps(net, ["enc1", "enc2"]) as taps:

        def step(images: Tensor, mask: Tensor) -> Tensor:
            return net(images).square().mean() + fdk.feature_discrepancy_loss(taps, mask)

        fast = torch.compile(step, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            fast(images, mask)
            with pytest.raises(RuntimeError, match=r"lets go of their features.*read taps.features before"):
                _ = taps.features
        net(images)
        torch.testing.assert_close(taps.features[0], net.enc1(images))


def test_taps_on_a_compiled_network_by_the_names_of_the_network():
    net = Net()
    fast = torch.compile(net, backend="aot_eager")
    images = torch.randn(3, 1, 8, 8)
    with fdk.FeatureTaps(fast, ["enc1", "enc2"]) as taps:
        fast(images)
        torch.testing.assert_close(taps.features[0], net.enc1(images))


def test_alpha_keeps_its_bounds_when_compiled(compiled):
    crit = fdk.FeatureDiscrepancyLoss(1, alpha_max=0.5)
    features, mask = layers()[0], torch.rand(3, 8, 8)
    fast = compiled(crit)
    with torch.no_grad():
        crit.alpha.fill_(7.0)
    got = fast(features, mask)
    wanted = 0.5 * fdk.feature_discrepancy_loss(features, mask)
    torch.testing.assert_close(got, wanted)


def test_a_ramp_rises_when_compiled(compiled):
    crit = fdk.FeatureDiscrepancyLoss(1, "ramp", ramp_steps=2)
    features, mask = layers()[0], torch.rand(3, 8, 8)
    fast = compiled(crit)
    values = [fast(features, mask).item() for _ in range(4)]
    loss = fdk.feature_discrepancy_loss(features, mask).item()
    assert values == pytest.approx([0, loss / 2, loss, loss], rel=1e-5)
