"""FeatureTaps(fused=True): the numbers of plain taps, written where the gradient of the network arrives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk
from kernel_launches import recorded_calls


class Deep(nn.Module):
    """Two levels down and one up, with what a segmentation network has."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.enc2 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.dec1 = nn.Conv2d(10, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        skip = self.enc1(images)
        up = nn.functional.interpolate(self.enc2(skip), scale_factor=2)
        return self.head(self.dec1(torch.cat([skip, up], dim=1)))


NAMES = ("enc1", "enc2", "dec1")


def gradients(total: Tensor, *modules: nn.Module, **options) -> list[Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    return list(torch.autograd.grad(total, parameters, allow_unused=True, **options))


def assert_all_close(got, wanted, **tolerance) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


class Step:
    """One training step of a network of float64, with taps of either kind."""

    def __init__(self, net: nn.Module | None = None, names=NAMES, **options) -> None:
        self.net = Deep().double() if net is None else net
        self.names, self.options = names, options
        self.images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
        self.mask = torch.rand(3, 8, 8) > 0.5

    def parts(self, fused: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mask = self.mask if mask is None else mask
        with fdk.FeatureTaps(self.net, self.names, fused=fused) as taps:
            logits = self.net(self.images)
            features = taps if fused else taps.features
            return logits.square().mean(), fdk.feature_discrepancy_loss(features, mask, **self.options)

    def total(self, fused: bool) -> Tensor:
        main, loss = self.parts(fused)
        return main + loss


@pytest.mark.parametrize("used", ["both", "only the network", "only the loss"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convention": "region_mean", "layer_weights": [0.5, 2.0, 1.0]},
        {"convention": "released", "reduction": "sum"},
        {"exchange": "shuffle", "pairing": torch.tensor([2, 0, 1])},
        {"exchange": "pooled", "pairing": torch.tensor([[0, 1], [2, 1]])},
    ],
    ids=["paper", "region_mean-weights", "released-sum", "shuffle", "pooled"],
)
def test_fused_taps_give_the_numbers_of_plain_ones(options, used):
    step = Step(**options)

    def run(fused: bool):
        main, loss = step.parts(fused)
        return loss, {"both": main + loss, "only the network": main, "only the loss": loss}[used]

    (loss, total), (other_loss, other_total) = run(True), run(False)
    # The kernel adds up shares of layers, the taps' losses are averaged by torch: a rounding apart.
    torch.testing.assert_close(loss, other_loss, rtol=1e-15, atol=0)
    assert_all_close(gradients(total, step.net), gradients(other_total, step.net))


def test_fused_taps_beside_ignored_pixels_in_channels_last_and_half_precision():
    net = Deep().to(memory_format=torch.channels_last)
    images = torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last)
    mask = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    grads = []
    for fused in (True, False):
        with fdk.FeatureTaps(net, NAMES, fused=fused) as taps, torch.autocast("cpu", torch.bfloat16):
            logits = net(images)
            assert taps.features[1].dtype == torch.bfloat16
            features = taps if fused else taps.features
            loss = fdk.feature_discrepancy_loss(features, mask, ignore_index=2)
        grads.append(gradients(logits.float().square().mean() + loss, net))
    # The sum of the two gradients is rounded to bfloat16 once, where autograd rounds each and their sum.
    assert_all_close(grads[0], grads[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fused_taps_are_one_pass_forward_and_one_write_a_tap_that_adds_what_arrives(
    backend, device, reduction
):
    net, images, mask = Deep().to(device), torch.randn(3, 1, 8, 8), torch.rand(3, 8, 8) > 0.5
    images, mask = images.to(device), mask.to(device)
    options = {"reduction": reduction, "backend": backend}
    with recorded_calls(backend) as calls, fdk.FeatureTaps(net, NAMES, fused=True) as taps:
        main = net(images).square().mean()
        loss = fdk.feature_discrepancy_loss(taps, mask, **options).sum()
        assert calls.take() == ["masks", "sums"]
        got = gradients(main + loss, net)
    assert calls.names == ["gradient"] * 3
    arrived = [[grad is not None for grad in arguments[3]] for _, arguments, _ in calls.calls]
    assert arrived == [[True]] * 3
    with fdk.FeatureTaps(net, NAMES) as taps:
        main = net(images).square().mean()
        loss = fdk.feature_discrepancy_loss(taps.features, mask, **options).sum()
    assert_all_close(got, gradients(main + loss, net), rtol=1e-4, atol=1e-5)


def test_a_second_backward_of_fused_taps_is_as_the_first():
    step = Step()
    total = step.total(fused=True)
    first = gradients(total, step.net, retain_graph=True)
    assert_all_close(gradients(total, step.net), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(total, step.net)


def test_the_loss_of_fused_taps_may_go_backward_by_itself_and_then_the_network():
    step = Step()
    main, loss = step.parts(fused=True)
    wanted = gradients(step.total(fused=False), step.net)
    loss.backward(retain_graph=True)
    main.backward()
    assert_all_close([p.grad for p in step.net.parameters()], wanted)


def test_gradients_accumulate_over_the_steps_of_fused_taps():
    step = Step()
    sums = []
    for fused in (True, False):
        step.net.zero_grad()
        for _ in range(2):
            step.total(fused).backward()
        sums.append([p.grad for p in step.net.parameters()])
    assert_all_close(*sums)


def test_second_derivatives_through_fused_taps_are_those_of_plain_ones():
    step = Step(eps=1e-3)
    results = []
    for fused in (True, False):
        first = gradients(step.total(fused), step.net, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        results.append(gradients(penalty, step.net))
    assert_all_close(*results)


def test_gradcheck_and_gradgradcheck_of_fused_taps():
    net, mask = nn.Sequential(nn.Tanh(), nn.Tanh()), torch.rand(2, 2, 2, dtype=torch.float64)

    def outputs(images: Tensor) -> tuple[Tensor, Tensor]:
        with fdk.FeatureTaps(net, ["0", "1"], fused=True) as taps:
            out = net(images)
            return out, fdk.feature_discrepancy_loss(taps, mask, eps=1e-3)

    images = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (images,))
    assert torch.autograd.gradgradcheck(outputs, (images,))


def test_a_second_loss_on_one_forward_pass_of_fused_taps_adds_its_gradient():
    step = Step()
    other = torch.rand(3, 8, 8) > 0.3

    def total(fused: bool) -> Tensor:
        with fdk.FeatureTaps(step.net, NAMES, fused=fused) as taps:
            logits = step.net(step.images)
            features = taps if fused else taps.features
            losses = [fdk.feature_discrepancy_loss(features, mask) for mask in (step.mask, other)]
        return logits.square().mean() + losses[0] + 2 * losses[1]

    assert_all_close(gradients(total(True), step.net), gradients(total(False), step.net))


def test_a_mask_that_asks_for_a_gradient_takes_the_features_as_they_are():
    soft = torch.rand(3, 8, 8, dtype=torch.float64, requires_grad=True)
    step = Step()
    grads = []
    for fused in (True, False):
        main, loss = step.parts(fused, soft)
        grads.append(gradients(main + loss.sum(), step.net))
    assert_all_close(*grads)


@pytest.mark.parametrize("convention", ["paper", "released"])
@pytest.mark.parametrize("ignore_index", [None, 1])
def test_entries_of_fused_taps_have_the_gradients_of_plain_ones(convention, ignore_index):
    step = Step(reduction="none", convention=convention, ignore_index=ignore_index)
    results = []
    for fused in (True, False):
        main, entries = step.parts(fused)
        weights = torch.linspace(-1, 1, entries.numel(), dtype=entries.dtype).view_as(entries)
        first = gradients(main + (weights * entries).sum(), step.net, create_graph=True)
        second = gradients(sum(grad.square().sum() for grad in first), step.net)
        results.append((entries, first, second))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_all_close(results[0][1], results[1][1])
    assert_all_close(results[0][2], results[1][2])


@pytest.mark.parametrize("active", [True, False])
def test_the_criterion_takes_fused_taps(active):
    step = Step()
    crit = fdk.FeatureDiscrepancyLoss(3, alpha_init=0.5, active=active).double()
    results = []
    for fused in (True, False):
        with fdk.FeatureTaps(step.net, NAMES, fused=fused) as taps:
            main = step.net(step.images).square().mean()
            loss = crit(taps if fused else taps.features, step.mask)
        modules = (step.net, crit) if active else (step.net,)
        results.append((loss, crit.layer_losses, gradients(main + loss, *modules)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert_all_close(results[0][2], results[1][2])


def test_a_frozen_criterion_writes_no_gradient_at_fused_taps():
    step = Step()
    crit = fdk.FeatureDiscrepancyLoss(1, active=False).double()
    grads = []
    with fdk.FeatureTaps(step.net, ["enc2"], fused=True) as taps:
        out = step.net(step.images)
        taps.features[0].register_hook(grads.append)
        tap_node = taps.features[0].grad_fn
        total = out.sum() + crit(taps, step.mask)
    handed_on = []
    tap_node.register_hook(lambda grad_inputs, grad_outputs: handed_on.append(grad_inputs[0]))
    total.backward()
    assert handed_on[0].data_ptr() == grads[0].data_ptr()


def test_a_layer_without_gradient_beside_fused_taps():
    step = Step()
    step.net.enc1.requires_grad_(False)
    assert_all_close(
        gradients(step.total(True), step.net.enc2, step.net.dec1),
        gradients(step.total(False), step.net.enc2, step.net.dec1),
    )


def test_fused_taps_leave_evaluation_alone():
    step = Step()
    with torch.no_grad():
        _, loss = step.parts(fused=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, step.parts(fused=False)[1].detach())


def test_two_fused_taps_on_one_network_add_their_gradients():
    step = Step()

    def total(fused: bool) -> Tensor:
        with (
            fdk.FeatureTaps(step.net, NAMES, fused=fused) as outer,
            fdk.FeatureTaps(step.net, NAMES[1:], fused=fused) as inner,
        ):
            out = step.net(step.images).square().mean()
            first, second = (taps if fused else taps.features for taps in (outer, inner))
            loss = fdk.feature_discrepancy_loss(first, step.mask)
            return out + loss + fdk.feature_discrepancy_loss(second, step.mask, convention="lemma7")

    assert_all_close(gradients(total(True), step.net), gradients(total(False), step.net))


def test_a_change_in_place_behind_autograd_is_refused_under_fused_taps():
    step = Step()
    with fdk.FeatureTaps(step.net, NAMES, fused=True) as taps:
        step.net(step.images)
        taps.features[1].detach().mul_(2)
        with pytest.raises(RuntimeError, match="the output of 'enc2' was modified in place after"):
            fdk.feature_discrepancy_loss(taps, step.mask)


def test_a_mask_changed_in_place_between_forward_and_backward_of_fused_taps_is_noticed():
    step = Step()
    total = step.total(fused=True)
    step.mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


class Checkpointed(Deep):
    reentrant = False

    def forward(self, images: Tensor) -> Tensor:
        run = torch.utils.checkpoint.checkpoint
        skip = self.enc1(images)
        deep = run(self.enc2, skip, use_reentrant=self.reentrant)
        up = nn.functional.interpolate(deep, scale_factor=2)
        return self.head(self.dec1(torch.cat([skip, up], dim=1)))


@pytest.mark.parametrize("fused", [True, False])
def test_taps_under_activation_checkpointing_give_the_numbers_without(fused):
    step = Step()
    wanted = gradients(step.total(False), step.net)
    step.net.__class__ = Checkpointed
    with fdk.FeatureTaps(step.net, NAMES, fused=fused) as taps:
        out = step.net(step.images).square().mean()
        kept = taps.features[1]
        loss = fdk.feature_discrepancy_loss(taps if fused else taps.features, step.mask)
        assert_all_close(gradients(out + loss, step.net), wanted)
        assert taps.features[1] is kept


def test_reentrant_checkpointing_of_a_fused_tap_is_refused():
    step = Step(Checkpointed().double())
    step.net.reentrant = True
    with pytest.raises(RuntimeError, match=r"'enc2' were computed without gradients.*use_reentrant=False"):
        step.total(fused=True)


def test_reentrant_checkpointing_of_a_plain_tap_is_refused_where_the_features_are_read_for_a_loss():
    step = Step(Checkpointed().double())
    step.net.reentrant = True
    with pytest.raises(RuntimeError, match=r"'enc2' were computed without gradients.*use_reentrant=False"):
        step.total(fused=False)
    with fdk.FeatureTaps(step.net, NAMES) as taps:
        step.net(step.images)
        with torch.no_grad():
            assert taps.features[1].isfinite().all()


def test_a_part_that_a_network_runs_without_gradients_by_itself_can_be_read():
    class Frozen(Deep):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                skip = self.enc1(images)
            return self.head(self.dec1(torch.cat([skip, torch.zeros_like(skip), skip[:, :2]], dim=1)))

    step = Step(Frozen().double(), ("enc1", "dec1"))
    assert step.total(fused=False).isfinite()


def test_fused_taps_under_torch_compile_give_the_numbers_of_plain_ones():
    step = Step()
    wanted = gradients(step.total(False), step.net)

    def compiled_step(images: Tensor) -> Tensor:
        logits = step.net(images)
        return logits.square().mean() + fdk.feature_discrepancy_loss(taps, step.mask)

    with fdk.FeatureTaps(step.net, NAMES, fused=True) as taps:
        torch.compiler.reset()
        whole = torch.compile(compiled_step, backend="aot_eager", fullgraph=True)(step.images)
        assert_all_close(gradients(whole, step.net), wanted)
    fast = torch.compile(step.net, backend="aot_eager")
    with fdk.FeatureTaps(fast, NAMES, fused=True) as taps:
        main = fast(step.images).square().mean()
        total = main + fdk.feature_discrepancy_loss(taps, step.mask)
        assert_all_close(gradients(total, step.net), wanted)


def test_the_features_of_fused_taps_are_what_the_network_goes_on_with():
    net = Deep()
    with fdk.FeatureTaps(net, ["enc1.0"], fused=True) as taps:
        seen = []
        net.enc1[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        net(torch.randn(2, 1, 8, 8))
        assert taps.features[0] is seen[0]
