"""The feature discrepancy loss: a function, `tap`, and a module that owns the layer weights α."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fdkernels import backend as backends
from fdkernels import checks
from fdkernels.conventions import MASK_RESIZES, Convention, get_convention
from fdkernels.discrepancy import draw_pairing, gather_batch
from fdkernels.layer_losses import (
    fused_layer_losses,
    one_loss,
    tapped_layer_losses,
    tapped_region_sums,
)
from fdkernels.layer_masks import layer_masks
from fdkernels.log_norm import Options, log_norm
from fdkernels.log_norm.options import EXCHANGES, REDUCTIONS
from fdkernels.region_sums.api import sum_regions
from fdkernels.region_sums.geometry import accumulate_dtype
from fdkernels.taps import FeatureTaps

__all__ = ["feature_discrepancy_loss", "tap"]

Features = TypeVar("Features", Tensor, Sequence[Tensor])


def feature_discrepancy_loss(
    features: Tensor | Sequence[Tensor] | FeatureTaps,
    mask: Tensor,
    *,
    convention: str | Convention = "paper",
    exchange: str = "none",
    pairing: Tensor | None = None,
    domains: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    layer_weights: Tensor | Sequence[float] | None = None,
    mask_resize: str | None = None,
    ignore_index: float | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the feature discrepancy loss of one layer or of several.

    With the mask y and validity v at the layer's size, S_fg[n,c] = Σ_p v·y·F, S_bg[n,c] = Σ_p v·(1-y)·F and
    V[n] = Σ_p v, the default convention `"paper"` is

        L[n] = -log( Σ_c ((S_fg[n,c] - S_bg[n,c]) / V[n])² + ε )

    One read of the features forward, one write of their gradient backward, and nothing of their size is
    kept, unless the mask asks for a gradient. For one layer of the mask's size it replaces::

        fg = (features * mask).flatten(2).mean(-1)
        bg = (features * (1 - mask)).flatten(2).mean(-1)
        loss = -(fg - bg).square().sum(1).add(eps).log().mean()

    Args:
        features: [N, C, *S] with 1 to 3 spatial dimensions, float32, float64, bfloat16 or float16, in any
            layout; or a sequence of them, one for each of L layers, of one batch size and device; or the
            `FeatureTaps` that hold them.
        mask: [N, 1, *S0] or [N, *S0], bool, integer {0, 1} or floating point in [0, 1].
        convention: the reading of the paper, one of `fdkernels.CONVENTIONS`, or a `Convention`.
        exchange: the cross-sample term that is added: `"none"`; `"shuffle"`, the foreground of a random
            other sample; `"pooled"`, pairs of samples from two domains.
        pairing: the partners, drawn where not given: [N] for `"shuffle"`, the sample whose foreground meets
            background n; [K, 2] for `"pooled"`. Sample numbers are those of the whole group's batch.
        domains: [N] of 0 (base) and 1 (novel), from which `"pooled"` draws its pairs.
        generator: where random pairs come from; None is torch's own generator.
        group: the ranks over whose samples pairs are made; each must hold the same number of samples.
            The result, on every rank, is that of one process with the whole batch, and so is the gradient
            once DistributedDataParallel has averaged it.
        layer_weights: [L], α; weighted layers are added. Differentiable.
        mask_resize: `"area"`, `"max"` or `"nearest"`; None is the convention's own.
        ignore_index: the mask value of pixels to leave out.
        eps: ε, at least 0.
        reduction: `"mean"` or `"sum"` over the samples that count; several layers without weights are
            averaged under `"mean"` and added under `"sum"`. `"none"` keeps the entries.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A scalar; under `reduction="none"` [N] for one layer and [N, L] for several, times the weights if
        there are any (under a convention with `norm="batch"`, such as `"released"`: [C], for several layers
        side by side). float32, or float64 if any layer is. Samples that do not count have the entry 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, value or name. Values are checked on the CPU and, elsewhere, under
            `fdkernels.debug()`.
        RuntimeError: the backend is not available.

    References:
        "Causal frameworks and feature discrepancy loss", eq. 1 and 2, Definitions 4 and 6, Algorithm 1; the
        later version is arXiv:2507.19575.
    """
    settings = Settings(
        convention=get_convention(convention),
        exchange=exchange,
        mask_resize=mask_resize,
        ignore_index=ignore_index,
        eps=eps,
        reduction=reduction,
        group=group,
        backend=backend,
    )
    layers, mask = check_features_and_mask(features, mask, settings)
    partners = Partners(pairing, domains, generator)
    taps = features if isinstance(features, FeatureTaps) else None
    share = _share(layers, layer_weights, reduction)
    per_layer, _ = layer_losses(layers, mask, settings, partners, taps=taps, share=share)
    return _combine(per_layer, layers, layer_weights, reduction)


def tap(
    features: Features,
    mask: Tensor,
    *,
    convention: str | Convention = "paper",
    exchange: str = "none",
    pairing: Tensor | None = None,
    domains: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    layer_weights: Tensor | Sequence[float] | None = None,
    mask_resize: str | None = None,
    ignore_index: float | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Features, Tensor]:
    """Pass features through unchanged and compute their loss, with one shared backward pass.

    `out, loss = tap(features, mask)` gives the numbers of::

        out, loss = features, feature_discrepancy_loss(features, mask)

    but where `out` takes the place of `features` in the rest of the network, backward reads the gradient that
    arrives at `out` once and writes the sum with the loss's gradient once; otherwise the loss writes a
    gradient, and autograd reads both and writes their sum.

    Args:
        features: as for `feature_discrepancy_loss`.
        mask: as for `feature_discrepancy_loss`; so are all others.

    Returns:
        The features themselves, not copied (a list for a sequence), and the loss.

    Raises:
        TypeError, ValueError, RuntimeError: as for `feature_discrepancy_loss`.
    """
    settings = Settings(
        convention=get_convention(convention),
        exchange=exchange,
        mask_resize=mask_resize,
        ignore_index=ignore_index,
        eps=eps,
        reduction=reduction,
        group=group,
        backend=backend,
    )
    layers, mask = check_features_and_mask(features, mask, settings)
    partners = Partners(pairing, domains, generator)
    share = _share(layers, layer_weights, reduction)
    per_layer, tapped = layer_losses(layers, mask, settings, partners, tapped=True, share=share)
    loss = _combine(per_layer, layers, layer_weights, reduction)
    return (tapped[0] if isinstance(features, Tensor) else tapped), loss


class Settings(NamedTuple):
    """What stays the same from call to call; the arguments of `feature_discrepancy_loss` of these names."""

    convention: Convention
    exchange: str
    mask_resize: str | None
    ignore_index: float | None
    eps: float
    reduction: str
    group: dist.ProcessGroup | None
    backend: str

    def check(self) -> None:
        """Raise TypeError or ValueError for a setting that does not exist."""
        checks.one_of("exchange", self.exchange, EXCHANGES)
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.non_negative("eps", self.eps)
        checks.one_of("backend", self.backend, ("auto", *backends.BACKENDS))
        if self.mask_resize is not None:
            checks.one_of("mask_resize", self.mask_resize, MASK_RESIZES)


class Partners(NamedTuple):
    """Who meets whom under an exchange, or how that is drawn."""

    pairing: Tensor | None = None
    domains: Tensor | None = None
    generator: torch.Generator | None = None


def check_features_and_mask(
    features: Tensor | Sequence[Tensor] | FeatureTaps, mask: Tensor, settings: Settings
) -> tuple[list[Tensor], Tensor]:
    """The layers as a list and the mask as [N, 1, *S0], all checked, and the settings with them."""
    settings.check()
    layers = checks.as_layers(features.features if isinstance(features, FeatureTaps) else features)
    return layers, checks.check_mask(mask, layers, settings.ignore_index)


def layer_losses(
    layers: Sequence[Tensor],
    mask: Tensor,
    settings: Settings,
    partners: Partners,
    tapped: bool = False,
    taps: FeatureTaps | None = None,
    share: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """The stages in order: layer_masks, region_sums, discrepancy, log_norm.

    `taps` are those from which the layers come, if any. A `share` other than 0 permits to return the one loss
    Σ_l share·L_l, where that saves something.

    Returns:
        The loss of each layer as `log_norm` gives it ([L], [N, L] or [ΣC]; over a group without reduction
        this rank's rows) or the one loss [], and under `tapped` an alias of each layer, else an empty list.
    """
    convention, group = settings.convention, settings.group
    device, batch = layers[0].device, layers[0].shape[0]
    backend = backends.resolve(settings.backend, device)
    world = 1 if group is None else dist.get_world_size(group)
    pairing = draw_pairing(settings.exchange, world * batch, device, *partners, group)
    sizes = [layer.shape[2:] for layer in layers]
    masks = layer_masks(
        mask,
        sizes,
        accumulate_dtype(layers),
        settings.mask_resize or convention.mask_resize,
        settings.ignore_index,
        backend,
    )
    options = Options(
        convention.region_weight,
        convention.masked_background,
        convention.norm,
        float(convention.log_scale),
        float(settings.eps),
        settings.exchange,
        settings.reduction,
    )
    fused = None if taps is None or mask.requires_grad else taps.take_stand_ins()
    if group is None and options.reduction != "none" and not mask.requires_grad:
        if fused is not None:
            return tapped_layer_losses(layers, *fused, masks, pairing, options, backend), []
        per_layer, *aliases = fused_layer_losses(layers, masks, pairing, options, backend, tapped, share)
        return per_layer, aliases
    if fused is not None:
        sums, masses = tapped_region_sums(layers, *fused, masks, backend)
        aliases = []
    else:
        sums, masses, *aliases = sum_regions(layers, masks, backend, tapped)
    if group is not None:
        sums, masses = gather_batch(sums, group), gather_batch(masses, group)
    channels = [layer.shape[1] for layer in layers]
    pixels = [size.numel() for size in sizes]
    per_layer = log_norm(sums, masses, pairing, channels, pixels, options, backend)
    if group is not None and per_layer.dim() == 2:
        per_layer = per_layer.chunk(world)[dist.get_rank(group)]
    return per_layer, aliases


def _combine(
    per_layer: Tensor,
    layers: Sequence[Tensor],
    layer_weights: Tensor | Sequence[float] | None,
    reduction: str,
) -> Tensor:
    """The layers' losses [L], entries [N, L] or [ΣC], or the one loss [], as the one result of a call."""
    if per_layer.dim() == 0:
        return per_layer
    weights = checks.check_layer_weights(layer_weights, layers)
    if weights is not None and per_layer.dim() == 1 and reduction == "none":
        counts = torch.tensor([layer.shape[1] for layer in layers], device=weights.device)
        weights = weights.repeat_interleave(counts, output_size=per_layer.shape[0])
    if weights is not None:
        per_layer = per_layer * weights.to(per_layer.dtype)
    if reduction == "none":
        return per_layer.squeeze(1) if per_layer.shape[1:] == (1,) else per_layer
    return one_loss(per_layer, _share(layers, layer_weights, reduction) or 1.0)


def _share(layers: Sequence[Tensor], layer_weights: object, reduction: str) -> float:
    """What each layer's loss counts in the one result, or 0 where that is not a number known here."""
    if layer_weights is not None or reduction == "none":
        return 0.0
    return 1 / len(layers) if reduction == "mean" else 1.0
