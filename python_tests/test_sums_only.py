"""A network compiled by itself puts out sums in place of features: taps.mask(mask, sums_only=True)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk

NAMES = ["enc", "down", "dec"]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    """Three levels in 1 to 3 dimensions, one of them with a norm that can be fused."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.enc = nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True))
        self.down = conv(4, 6, 3, 2, 1)
        self.dec = conv(10, 5, 3, padding=1)
        self.head = conv(5, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        skip = self.enc(images)
        up = nn.functional.interpolate(self.down(skip), scale_factor=2)
        return self.head(self.dec(torch.cat([skip, up], dim=1)))


def images_and_mask(dtype: torch.dtype = torch.bool, dimensions: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    size = (4, 1, *[8] * dimensions)
    return torch.rand(size), (torch.rand(size) > 0.5).to(dtype)


def step(network: nn.Module, images: Tensor, mask: Tensor, loss_of, given: dict | None) -> list[Tensor]:
    """The loss of the network's output and of `loss_of(taps)`, and all gradients, α's included."""
    torch.manual_seed(1)
    with fdk.FeatureTaps(network, NAMES) as taps:
        compiles = given is not None
        ran = torch.compile(network, backend="aot_eager", fullgraph=True) if compiles else network
        alpha = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
        with taps.mask(mask, sums_only=compiles, **(given or {})):
            out = ran(images)
        loss = out.square().mean() + loss_of(taps, mask, alpha)
        grads = torch.autograd.grad(loss, [alpha, *network.parameters()])
    return [loss.detach(), *grads]


def check(loss_of, images: Tensor, mask: Tensor, **given) -> None:
    """Loss and gradients are those of the network that was not compiled."""
    torch.manual_seed(2)
    network = Net(images.dim() - 2)
    wanted = step(network, images, mask, loss_of, None)
    for got, expected in zip(step(network, images, mask, loss_of, given), wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.int64])
@pytest.mark.parametrize("exchange", ["none", "shuffle"])
def test_loss_and_gradients_are_those_of_features(dtype, exchange):
    def loss(taps, mask, alpha):
        return fdk.feature_discrepancy_loss(taps, mask, layer_weights=alpha, exchange=exchange)

    check(loss, *images_and_mask(dtype))


@pytest.mark.parametrize("convention", [name for name in fdk.CONVENTIONS if name != "fisher"])
def test_every_convention_of_two_regions(convention):
    def loss(taps, mask, alpha):
        options = {"reduction": "none"} if convention == "region_mean" else {"layer_weights": alpha}
        entries = fdk.feature_discrepancy_loss(taps, mask, convention=convention, **options)
        return entries.mean(0).dot(alpha) if convention == "region_mean" else entries

    check(loss, *images_and_mask(), mask_resize="max" if convention == "released" else "area")


@pytest.mark.parametrize("dimensions", [1, 3])
def test_lines_and_volumes_with_ignored_pixels(dimensions):
    images, mask = images_and_mask(torch.int64, dimensions)
    mask[:, :, 3:5] = 255

    def loss(taps, mask, alpha):
        return fdk.feature_discrepancy_loss(taps, mask, layer_weights=alpha, ignore_index=255)

    check(loss, images, mask, ignore_index=255)


def test_a_mask_that_needs_a_gradient_is_served_by_the_features():
    images, mask = images_and_mask(torch.float32)
    network, masks = Net(), [mask.clone().requires_grad_() for _ in range(2)]
    for soft, compiles in zip(masks, (False, True), strict=True):
        torch.manual_seed(1)
        with fdk.FeatureTaps(network, NAMES) as taps:
            ran = torch.compile(network, backend="aot_eager") if compiles else network
            with taps.mask(soft, sums_only=True):
                ran(images)
            fdk.feature_discrepancy_loss(taps, soft).backward()
    torch.testing.assert_close(masks[1].grad, masks[0].grad)


def maps_put_out(sums_only: bool) -> int:
    """How many feature maps the compiled graph of a network puts out beside its output."""
    found = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        found.append(sum(node.meta["example_value"].dim() == 4 for node in output.args[0]))
        return graph

    images, mask = images_and_mask()
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps, taps.mask(mask, sums_only=sums_only):
        torch.compile(network, backend=keep, fullgraph=True)(images)
    return found[-1] - 1


def test_the_graph_puts_out_sums_in_place_of_features():
    assert maps_put_out(sums_only=False) == len(NAMES)
    assert maps_put_out(sums_only=True) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_as_without_the_compiler(backend):
    images, mask = images_and_mask(torch.float32)
    weights = []
    for compiles in (False, True):
        torch.manual_seed(3)
        network = Net()
        fdk.fuse_norms(network)
        taps = fdk.FeatureTaps(network, NAMES, fused=True)
        crit = fdk.FeatureDiscrepancyLoss(len(NAMES), alpha_init=0.1, active=False)
        optimizer = torch.optim.SGD([*network.parameters(), *crit.parameters()], lr=0.1)
        ran = torch.compile(network, backend=backend, fullgraph=True) if compiles else network
        for number in range(4):
            if number == 1:
                crit.activate()
            optimizer.zero_grad()
            compiles_anew = torch._dynamo.config.patch(error_on_recompile=number > 0)
            with compiles_anew, taps.mask(mask.clone(), sums_only=True):
                loss = ran(images).square().mean()
            loss = loss + crit(taps)
            taps.clear()
            loss.backward()
            optimizer.step()
            assert crit.layer_losses.isfinite().all()  # while frozen, too
        weights.append([parameter.detach() for parameter in (*network.parameters(), crit.alpha)])
        taps.close()
    for got, wanted in zip(weights[1], weights[0], strict=True):
        torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_refused():
    images, mask = images_and_mask()
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps:
        with taps.mask(mask, sums_only=True):
            torch.compile(network, backend="eager", fullgraph=True)(images.requires_grad_())
        loss = fdk.feature_discrepancy_loss(taps, mask)
    with pytest.raises(RuntimeError, match="no second derivatives; leave sums_only out"):
        torch.autograd.grad(loss, images, create_graph=True)


class Twice(nn.Module):
    """One block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.block(self.block(images))


@pytest.mark.parametrize("calls", ["last", "all"])
def test_a_block_that_runs_twice(calls):
    images, mask = images_and_mask()
    network = Twice()
    with fdk.FeatureTaps(network, ["block"], calls=calls) as taps:
        losses = []
        for ran in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
            with taps.mask(mask, sums_only=True):
                ran(images)
            losses.append(fdk.feature_discrepancy_loss(taps, mask))
    torch.testing.assert_close(losses[1], losses[0])


def test_autocast_and_sizes_that_change():
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps:
        compiled = torch.compile(network, backend="aot_eager")
        for batch, side in ((4, 8), (2, 8), (3, 12)):
            images, mask = torch.rand(batch, 1, side, side), torch.rand(batch, side, side) > 0.5
            losses = []
            for ran in (network, compiled):
                with taps.mask(mask, sums_only=True), torch.autocast("cpu", torch.bfloat16):
                    ran(images)
                losses.append(fdk.feature_discrepancy_loss(taps, mask))
            assert losses[1].dtype == torch.float32
            torch.testing.assert_close(losses[1], losses[0])


def test_two_losses_can_take_the_sums_and_without_the_mask_features_can_be_read():
    images, mask = images_and_mask()
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps:
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        with taps.mask(mask, sums_only=True):
            compiled(images)
        first, second = (fdk.feature_discrepancy_loss(taps, mask, eps=eps) for eps in (1e-12, 1.0))
        assert first > second
        with pytest.raises(RuntimeError, match="keeps its features in its graph"):
            taps.features  # noqa: B018
        compiled(images)
        torch.testing.assert_close(fdk.feature_discrepancy_loss(taps.features, mask), first)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (
            lambda taps, mask: fdk.feature_discrepancy_loss(taps, mask, convention="fisher"),
            "need the features",
        ),
        (
            lambda taps, mask: fdk.feature_discrepancy_loss(
                taps, mask[:, 0].long(), mode="multiclass", num_classes=2
            ),
            "need the features",
        ),
        (lambda taps, mask: fdk.feature_discrepancy_loss(taps, mask.clone()), "the same mask, unchanged"),
        (
            lambda taps, mask: fdk.feature_discrepancy_loss(taps, mask.logical_not_()),
            "the same mask, unchanged",
        ),
        (
            lambda taps, mask: fdk.feature_discrepancy_loss(taps, mask, mask_resize="max"),
            "mask_resize='max'",
        ),
        (
            lambda taps, mask: fdk.feature_discrepancy_loss(taps, mask, channel_dim=-1, aspect="any"),
            "got channel_dim=-1",
        ),
    ],
)
def test_a_loss_that_needs_more_than_the_sums_is_refused(loss, reason):
    images, mask = images_and_mask()
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps:
        with taps.mask(mask, sums_only=True):
            torch.compile(network, backend="aot_eager", fullgraph=True)(images)
        with pytest.raises(RuntimeError, match=reason):
            loss(taps, mask)


def test_a_mask_that_does_not_fit_is_refused_by_the_loss():
    images, mask = images_and_mask()
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps:
        with taps.mask(mask[:2], sums_only=True):
            torch.compile(network, backend="aot_eager", fullgraph=True)(images)
        with pytest.raises(ValueError, match="mask must have the batch size of the features"):
            fdk.feature_discrepancy_loss(taps, mask[:2])


def test_in_a_graph_that_holds_the_loss_sums_alone_are_refused_or_not_needed():
    images, mask = images_and_mask()
    network = Net()
    with fdk.FeatureTaps(network, NAMES) as taps:

        def inside(images: Tensor, mask: Tensor) -> Tensor:
            with taps.mask(mask, sums_only=True):
                network(images)
            return fdk.feature_discrepancy_loss(taps, mask)

        def outside(images: Tensor, mask: Tensor) -> Tensor:
            network(images)
            return fdk.feature_discrepancy_loss(taps, mask)

        wanted = outside(images, mask)
        compiled = torch.compile(inside, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images, mask), wanted)
        with taps.mask(mask, sums_only=True), pytest.raises(Exception, match="the loss is compiled as well"):
            torch.compile(outside, backend="aot_eager", fullgraph=True)(images, mask)
