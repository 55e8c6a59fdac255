from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

import fdkernels as fdk
from fdkernels.segmentation.module import SeedSteps, SegmentationModule


def _module(active=True, network=None, **options):
    torch.manual_seed(0)
    model = fdk.models.create("unet", base_channels=2)
    criterion = fdk.FeatureDiscrepancyLoss(9, active=active, **{"target": -20.0, **options})
    return SegmentationModule(model, criterion, lr=1e-3, alpha_lr=1e-2, **(network or {}))


def _batches(count=2, size=32):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(count, 2, 1, size, size, generator=generator).round()
    noise = torch.rand(count, 2, 3, size, size, generator=generator)
    return [{"image": (i + m) / 2, "mask": m} for i, m in zip(noise, mask, strict=True)]


def _fit(module, epochs=1, callbacks=(), batches=None, **settings):
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
        **settings,
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


def _weights(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def test_accumulated_batches_make_the_step_of_their_mean():
    batches = _batches(5)
    module = _module(alpha_init=0.5)
    seen = []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(pl_module.model.head.weight.grad.clone())

    # Without learning, each step's gradient is that of the first weights.
    module.lr = module.alpha_lr = 1e-30
    _fit(module, batches=batches, callbacks=[Record()], accumulate_grad_batches=3)
    alone = _module(alpha_init=0.5)
    alone.lr = alone.alpha_lr = 1e-30
    _fit(alone, batches=batches, callbacks=[Record()])
    accumulated, single = seen[:2], seen[2:]
    assert len(single) == 5
    torch.testing.assert_close(accumulated[0], torch.stack(single[:3]).mean(dim=0))
    torch.testing.assert_close(accumulated[1], torch.stack(single[3:]).mean(dim=0))


def test_accumulated_batches_count_as_one_pass_of_the_criterion():
    module = _module(alpha_rule="ramp", ramp_steps=2)
    _fit(module, epochs=3, batches=_batches(4), accumulate_grad_batches=4)
    assert module.criterion.steps == 3
    assert module.criterion.alpha.max() == 1


def test_alpha_that_moves_by_rare_steps_is_not_called_stuck():
    module = _module(patience=2)
    _fit(module, epochs=2, batches=_batches(6), accumulate_grad_batches=6)
    assert module.criterion.alpha.min() > 0


# In float64, since Adam makes steps of the whole learning rate out of float32's rounding errors.
def _assert_alike(modules):
    logged = [
        dict(_fit(module, epochs=2, callbacks=[SeedSteps(0)], precision="64-true").callback_metrics)
        for module in modules
    ]
    assert logged[0].keys() == logged[1].keys()
    for name, value in logged[0].items():
        assert logged[1][name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-6), name
    expected = _weights(modules[0])
    for name, value in _weights(modules[1]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()


def test_channels_last_trains_alike():
    modules = _module(alpha_init=0.5), _module(alpha_init=0.5, network={"channels_last": True})
    _assert_alike(modules)
    kernel = next(value for value in modules[1].model.parameters() if value.dim() == 4)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["none", "shuffle"])
def test_a_compiled_network_trains_alike(exchange):
    options = {"alpha_init": 0.5, "exchange": exchange}
    _assert_alike((_module(**options), _module(**options, network={"compile_network": True})))


def test_learning_rates_are_logged():
    logged = _fit(_module()).callback_metrics
    assert logged["lr/network"].item() == pytest.approx(1e-3)
    assert logged["lr/alpha"].item() == pytest.approx(1e-2)


@pytest.mark.parametrize("mixed", [True, False])
def test_a_batch_of_one_domain_is_trained_on_without_the_exchange(mixed):
    (batch,) = _batches(1)
    domains = torch.tensor([0, 1] if mixed else [0, 0])
    module = _module(exchange="pooled")
    _fit(module, batches=[{**batch, "domain": domains, "mixed": mixed}])
    direct = _module()
    _fit(direct, batches=[batch])
    same = torch.equal(module.epoch_layer_losses, direct.epoch_layer_losses)
    assert same != mixed
    assert module.criterion.exchange == "pooled"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_of_the_module_runs_its_own_network(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    module = _module(alpha_init=0.5, network={"compile_network": compiled})
    _fit(module)
    twin, again = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    image = torch.rand(1, 3, 32, 32)
    for other in (twin, again):
        torch.testing.assert_close(other.eval()(image), module.eval()(image))
        _fit(other.train())
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.zero_()
        assert other.eval()(image).count_nonzero() == 0
    assert module(image).count_nonzero() > 0
