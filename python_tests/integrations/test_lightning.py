"""The callback trains as a loop that adds the loss itself, and leaves the module as it was."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

import fdkernels as fdk
from fdkernels import layer_losses
from fdkernels.integrations.lightning import FeatureDiscrepancyCallback

NAMES = ["0", "2"]
LR = 0.05


class Pictures(Dataset):
    """Six images with masks, as dicts or pairs."""

    def __init__(self, as_dict: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(6, 1, 8, 8, generator=generator)
        self.masks = (torch.rand(6, 1, 8, 8, generator=generator) > 0.5).float()
        self.as_dict = as_dict

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, mask = self.images[index], self.masks[index]
        return {"image": image, "mask": mask} if self.as_dict else (image, mask)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.Upsample((8, 8)),
        nn.Conv2d(4, 1, 1),
    )


class Module(LightningModule):
    """Somebody's module, who knows nothing of the loss."""

    def __init__(self, schedule: str = "", as_dict: bool = False) -> None:
        super().__init__()
        self.network = network()
        self.schedule = schedule
        self.as_dict = as_dict
        self.rates: list[list[float]] = []
        self.loss = nn.BCEWithLogitsLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        image, mask = (batch["image"], batch["mask"]) if self.as_dict else batch
        loss = self.loss(self.network(image), mask)
        return {"loss": loss, "more": 3} if self.as_dict else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.network.parameters(), lr=LR, momentum=0.5, weight_decay=0.1)
        if not self.schedule:
            return optimizer
        scheduler = SCHEDULES[self.schedule](optimizer)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "val", "strict": False}
        if self.schedule == "plateau":
            config["interval"] = "epoch"
        return {"optimizer": optimizer, "lr_scheduler": config}


class Validated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(self.network(batch[0]), batch[1]))


class Manual(Module):
    def __init__(self, fd: FeatureDiscrepancyCallback | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.fd = fd

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(self.network(batch[0]), batch[1])
        if self.fd is not None:
            loss = loss + self.fd.loss(batch[1])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def _steps(optimizer: Any) -> Any:
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        [2],
    )


SCHEDULES = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step]),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, LR, total_steps=6),
    "sequential": _steps,
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, threshold=10, min_lr=[0.02]
    ),
}


def criterion(**options: Any) -> fdk.FeatureDiscrepancyLoss:
    return fdk.FeatureDiscrepancyLoss(2, **{"alpha_init": 0.3, "target": -5.0, **options})


def callback(crit: fdk.FeatureDiscrepancyLoss, **options: Any) -> FeatureDiscrepancyCallback:
    return FeatureDiscrepancyCallback(NAMES, crit, **{"network": "network", "alpha_lr": 1e-3, **options})


def trainer(fd: FeatureDiscrepancyCallback, tmp_path: Any, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "limit_val_batches": 0, "logger": False, **options}
    return Trainer(
        callbacks=[fd], default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


def loader(as_dict: bool = False, batch_size: int = 2) -> DataLoader:
    return DataLoader(Pictures(as_dict), batch_size=batch_size)


def by_hand(
    crit: fdk.FeatureDiscrepancyLoss, epochs: int, batch_size: int = 2, clip: float | None = None
) -> nn.Module:
    """What the callback should do, written out with plain features and the reference."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5, weight_decay=0.1)
    optimizer.add_param_group({"params": [crit.alpha], "lr": 1e-3, "weight_decay": 0.0})
    for _ in range(epochs):
        for image, mask in loader(batch_size=batch_size):
            features = [net[0](image)]
            features.append(net[2](net[1](features[0])))
            loss = functional.binary_cross_entropy_with_logits(net[4](net[3](features[1])), mask)
            optimizer.zero_grad()
            with fdk.use_backend("reference"):
                (loss + crit(features, mask)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
    return net


def assert_same(
    module: Module, crit: fdk.FeatureDiscrepancyLoss, net: nn.Module, truth: fdk.FeatureDiscrepancyLoss
) -> None:
    torch.testing.assert_close(crit.alpha, truth.alpha)
    assert not torch.equal(crit.alpha, torch.full((2,), 0.3))
    for ours, theirs in zip(module.network.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", ["pairs", "dicts", "manual"])
def test_a_fit_gives_what_a_loop_that_adds_the_loss_gives(tmp_path, kind, fused):
    crit, truth = criterion(), criterion()
    fd = callback(crit, fused=fused, mask_from_batch="mask" if kind == "dicts" else 1)
    module = Manual(fd) if kind == "manual" else Module(as_dict=kind == "dicts")
    trainer(fd, tmp_path).fit(module, loader(kind == "dicts"))
    assert_same(module, crit, by_hand(truth, 2), truth)
    assert int(crit.steps) == 6


@pytest.mark.parametrize("kind", ["pairs", "manual"])
def test_the_mask_comes_first_for_a_network_that_is_compiled(tmp_path, kind, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("the loss must be made of the sums that left the graph")

    torch.compiler.reset()
    crit, truth = criterion(), criterion()
    fd = callback(crit, mask_first=True)
    module = Manual(fd) if kind == "manual" else Module()
    module.network = torch.compile(module.network, backend="aot_eager", fullgraph=True)
    with monkeypatch.context() as patch:
        patch.setattr(layer_losses, "_from_layers", refuse)
        trainer(fd, tmp_path).fit(module, loader())
    assert_same(module, crit, by_hand(truth, 2), truth)


@pytest.mark.parametrize("convention", ["paper", "released", "fisher"])
def test_the_mask_comes_first_as_the_criterion_resizes_it(tmp_path, convention):
    crit, truth = (criterion(convention=convention) for _ in range(2))
    module = Module()
    trainer(callback(crit, mask_first=True), tmp_path).fit(module, loader())
    assert_same(module, crit, by_hand(truth, 2), truth)


def test_a_step_that_adds_the_loss_itself_is_left_alone(tmp_path):
    class Own(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + fd.loss(batch[1])

    crit, truth = criterion(), criterion()
    fd = callback(crit, mask_from_batch="not in the batch")
    module = Own()
    trainer(fd, tmp_path).fit(module, loader())
    assert_same(module, crit, by_hand(truth, 2), truth)


def test_manual_optimisation_without_the_loss_says_what_it_needs(tmp_path):
    crit = criterion()
    with pytest.warns(UserWarning, match=r"must add the feature discrepancy loss itself"):
        trainer(callback(crit), tmp_path, max_epochs=1).fit(Manual(), loader())
    torch.testing.assert_close(crit.alpha.detach(), torch.full((2,), 0.3))


def test_the_network_is_clipped_without_alpha(tmp_path):
    crit, truth = criterion(target=-1e4), criterion(target=-1e4)
    module = Module()
    trainer(callback(crit), tmp_path, gradient_clip_val=0.1).fit(module, loader())
    assert_same(module, crit, by_hand(truth, 2, clip=0.1), truth)


def test_an_accumulated_step_counts_once(tmp_path):
    crit, truth = criterion(), criterion()
    module = Module()
    # The masks weigh alike in the mean over samples, so that three batches of two make one of six.
    trainer(callback(crit), tmp_path, accumulate_grad_batches=3).fit(module, loader())
    assert int(crit.steps) == 2
    assert_same(module, crit, by_hand(truth, 2, batch_size=6), truth)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_of_alpha_follows_the_schedule(tmp_path, schedule):
    module = Validated(schedule)
    training = trainer(callback(criterion()), tmp_path, limit_val_batches=1, num_sanity_val_steps=0)
    training.fit(module, loader(), loader())
    assert len({lr for lr, _ in module.rates}) > 1
    for lr, alpha_lr in module.rates:
        assert alpha_lr == pytest.approx(lr * 1e-3 / LR)
    first, group = module.optimizers().param_groups
    assert group["weight_decay"] == 0
    assert group["momentum"] == first["momentum"]


def test_alpha_is_in_the_optimizer_once(tmp_path):
    class Own(Module):
        def configure_optimizers(self):
            groups = [{"params": self.network.parameters()}, *crit.parameter_groups(lr=0.5)]
            return torch.optim.SGD(groups, lr=LR)

    crit = criterion()
    module = Own()
    trainer(callback(crit), tmp_path, max_epochs=1).fit(module, loader())
    assert [group["lr"] for group in module.optimizers().param_groups] == [LR, 0.5]


def test_named_parameters_stay_named(tmp_path):
    class Own(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.network.named_parameters(), lr=LR)

    module = Own()
    trainer(callback(criterion()), tmp_path, max_epochs=1).fit(module, loader())
    assert module.optimizers().param_groups[1]["param_names"] == ["alpha"]


@pytest.mark.parametrize("epochs", [1, 3], ids=["in the warm start", "later"])
def test_a_resumed_fit_goes_on_as_an_unbroken_one(tmp_path, epochs):
    def make() -> tuple[Module, fdk.FeatureDiscrepancyLoss, FeatureDiscrepancyCallback]:
        crit = criterion(target=None)
        return Module("step"), crit, callback(crit, warm_start_epochs=2)

    whole, crit_of_whole, fd = make()
    trainer(fd, tmp_path, max_epochs=4).fit(whole, loader())

    first, _, fd = make()
    begun = trainer(fd, tmp_path, max_epochs=epochs)
    begun.fit(first, loader())
    begun.save_checkpoint(tmp_path / "last.ckpt")

    second, crit, fd = make()
    with torch.no_grad():
        second.network[0].weight.zero_()
    trainer(fd, tmp_path, max_epochs=4).fit(second, loader(), ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(crit.state_dict(), crit_of_whole.state_dict(), rtol=0, atol=0)
    assert crit.target is not None
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert second.rates[-1] == whole.rates[-1]


def test_alpha_is_frozen_in_the_warm_start(tmp_path):
    class Look(Module):
        def on_train_epoch_end(self):
            seen.append((crit.is_active, crit.alpha.detach().clone()))

    seen: list[Any] = []
    crit = criterion()
    trainer(callback(crit, warm_start_epochs=2), tmp_path, max_epochs=3).fit(Look(), loader())
    assert [active for active, _ in seen] == [False, False, True]
    assert not seen[1][1].any()
    assert seen[2][1].all()


def test_alpha_and_losses_of_an_epoch_are_logged(tmp_path):
    crit = criterion()
    fd = callback(crit)
    training = trainer(fd, tmp_path, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    training.fit(Module(), loader(batch_size=6))
    logged = training.logged_metrics
    for index, name in enumerate(NAMES):
        assert float(logged[f"alpha/{name}"]) == pytest.approx(crit.alpha[index].item())
        assert float(logged[f"discrepancy_loss/{name}"]) == pytest.approx(crit.layer_losses[index].item())


@pytest.mark.parametrize("fails", [False, True], ids=["after a fit", "after an error"])
def test_the_module_is_left_as_it_was(tmp_path, fails):
    class Broken(Module):
        def training_step(self, batch, batch_idx):
            if fails:
                raise OSError("the disk is gone")
            return super().training_step(batch, batch_idx)

    module = Broken()
    own = set(vars(module))
    fd = callback(criterion())
    training = trainer(fd, tmp_path, max_epochs=1)
    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            training.fit(module, loader())
    else:
        training.fit(module, loader())
    assert not {"training_step", "configure_gradient_clipping"} & (set(vars(module)) - own)
    assert all(not each._forward_hooks and not each._forward_pre_hooks for each in module.modules())
    with pytest.raises(RuntimeError, match=r"while Trainer\.fit runs"):
        fd.loss(torch.ones(1, 1, 8, 8))


def test_the_same_callback_serves_a_second_fit(tmp_path):
    crit = criterion()
    fd, module = callback(crit), Module()
    trainer(fd, tmp_path, max_epochs=1).fit(module, loader())
    alpha = crit.alpha.detach().clone()
    trainer(fd, tmp_path, max_epochs=1).fit(module, loader())
    assert (crit.alpha > alpha).all()


def test_copies_of_a_module_in_training_are_made(tmp_path):
    made = []

    class Average(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            twin = copy.deepcopy(self.network)
            made.append(twin(torch.zeros(1, 1, 8, 8)))

    trainer(callback(criterion()), tmp_path, max_epochs=1).fit(Average(), loader())
    assert made
    assert all(output.isfinite().all() for output in made)


def test_no_tensor_is_kept_from_step_to_step(tmp_path):
    class Count(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            gc.collect()
            alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
            live.append(len(alive))
            features.append(sum(each.shape == (2, 4, 8, 8) for each in alive))

    live: list[int] = []
    features: list[int] = []
    gc.freeze()  # what is there already need not be looked at
    try:
        trainer(callback(criterion()), tmp_path, max_epochs=3).fit(Count(), loader())
    finally:
        gc.unfreeze()
    assert live[6:] <= live[3:6]  # step for step of the epoch before
    assert not any(features)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_from_batch": 7}, "mask_from_batch must find the mask in a batch, got 7"),
        ({"mask_from_batch": "mask"}, "mask_from_batch must find the mask in a batch, got 'mask'"),
        ({"calls": "all"}, "calls must be 'once' or 'last'"),
        ({"warm_start_epochs": -1}, "warm_start_epochs must be at least 0, got -1"),
    ],
)
def test_errors_name_the_argument(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        trainer(callback(criterion(), **options), tmp_path).fit(Module(), loader())


def test_names_and_alpha_must_agree():
    with pytest.raises(ValueError, match=r"one alpha for each of the 1 names, got 2"):
        FeatureDiscrepancyCallback(["0"], criterion())
