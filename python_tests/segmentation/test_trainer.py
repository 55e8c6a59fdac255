from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import fdkernels as fdk
from fdkernels.segmentation.trainer import SeedSteps, SegmentationModule


def _module(active=True, **options):
    torch.manual_seed(0)
    model = fdk.models.create("unet", base_channels=2)
    criterion = fdk.FeatureDiscrepancyLoss(9, active=active, target=-20.0, **options)
    return SegmentationModule(model, criterion, lr=1e-3, alpha_lr=1e-2)


def _batches(count=2, size=32):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(count, 2, 1, size, size, generator=generator).round()
    noise = torch.rand(count, 2, 3, size, size, generator=generator)
    return [{"image": (i + m) / 2, "mask": m} for i, m in zip(noise, mask, strict=True)]


def _fit(module, epochs=1, callbacks=(), batches=None):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    loader = DataLoader(batches or _batches(), batch_size=None)
    trainer.fit(module, loader, loader)
    return trainer


def test_the_loss_is_the_objective_plus_the_weighted_layer_losses():
    module = _module(alpha_init=0.25)
    (batch,) = _batches(1)
    trainer = _fit(module, batches=[batch])
    logged = trainer.callback_metrics
    penalty = logged["train/loss"] - logged["train/segmentation_loss"]
    assert penalty.item() == pytest.approx(0.25 * module.epoch_layer_losses.sum().item(), abs=1e-4)


def test_every_layer_gets_a_gradient_from_the_loss():
    module = _module(alpha_init=0.5)
    (batch,) = _batches(1)
    with fdk.FeatureTaps(module.model, module.model.tap_names) as taps:
        module(batch["image"])
    module.criterion(taps.features, batch["mask"]).backward()
    for name in module.model.tap_names:
        gradients = [p.grad for p in module.model.get_submodule(name).parameters()]
        assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_alpha_is_a_group_of_its_own_only_while_it_is_active():
    module = _module()
    groups = module.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-2]
    assert groups[1]["params"] == [module.criterion.alpha]
    module.criterion.freeze()
    assert len(module.configure_optimizers().param_groups) == 1


def test_a_ramp_is_not_given_to_the_optimizer_and_rises():
    module = _module(alpha_rule="ramp", ramp_steps=2)
    assert len(module.configure_optimizers().param_groups) == 1
    _fit(module, epochs=2)
    assert module.criterion.alpha.min() > 0


def test_alpha_stays_within_its_bounds_after_each_step():
    module = _module(alpha_max=0.015)
    _fit(module, epochs=2)
    assert module.criterion.alpha.max().item() == pytest.approx(0.015)


def test_alpha_and_layer_losses_are_logged_by_layer():
    module = _module()
    logged = _fit(module).callback_metrics
    for index, name in enumerate(module.model.tap_names):
        assert logged[f"alpha/{name}"] == module.criterion.alpha[index]
        assert logged[f"discrepancy_loss/{name}"] == module.epoch_layer_losses[index]
    assert 0 <= logged["val/iou"] <= logged["val/dice"] <= 1


def test_no_hook_is_left_after_a_step():
    module = _module()
    _fit(module)
    assert not any(part._forward_hooks for part in module.model.modules())


def test_a_frozen_loss_trains_like_no_loss():
    with_loss = _module(active=False)
    torch.manual_seed(0)
    without = SegmentationModule(fdk.models.create("unet", base_channels=2), lr=1e-3)
    for module in (with_loss, without):
        _fit(module, epochs=2)
    states = with_loss.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loss_that_is_no_longer_finite_ends_the_training():
    module = _module()
    torch.nn.init.constant_(module.model.head.bias, float("nan"))
    with pytest.raises(RuntimeError, match="training loss became nan in epoch 1"):
        _fit(module)


def test_steps_are_seeded_by_seed_epoch_batch_and_rank():
    drawn = []
    _fit(_module(), epochs=3, callbacks=[SeedSteps(4, drawn.append)])
    again = []
    _fit(_module(), epochs=3, callbacks=[SeedSteps(4, again.append)])
    assert len(set(drawn)) == 3 * 2
    assert drawn == again
