"""The loss, its tap and the region sums, as functions of layers and a mask: one road through the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fdkernels import checks
from fdkernels.conventions import MASK_RESIZES, Convention
from fdkernels.inputs import check_inputs
from fdkernels.layer_losses import Partners, losses_per_layer, region_sums_of
from fdkernels.op.pyramid import describe
from fdkernels.op.registered import expand_factor
from fdkernels.settings import settings_of
from fdkernels.taps import FeatureTaps

__all__ = ["RegionSums", "feature_discrepancy_loss", "region_sums", "tap"]

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
    aspect: str = "same",
    channel_dim: int = 1,
    ignore_index: float | None = None,
    mode: str = "binary",
    num_classes: int | None = None,
    include_background: bool = True,
    pairs: Sequence[tuple[int, int]] | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the feature discrepancy loss of one layer or of several.

    With the mask y and validity v at the layer's size, S_fg[n,c] = Σ_p v·y·F, S_bg[n,c] = Σ_p v·(1-y)·F and
    V[n] = Σ_p v, the default convention `"paper"` is

        L[n] = -log( Σ_c ((S_fg[n,c] - S_bg[n,c]) / V[n])² + ε )

    Reads the features once forward, writes their gradient once backward, and keeps nothing of their size
    unless the mask requires a gradient. For one layer of the mask's size it replaces::

        fg = (features * mask).flatten(2).mean(-1)
        bg = (features * (1 - mask)).flatten(2).mean(-1)
        loss = -(fg - bg).square().sum(1).add(eps).log().mean()

    Args:
        features: [N, C, *S] with 1 to 3 spatial dimensions, float32, float64, bfloat16 or float16, in any
            layout; or a sequence of them, one for each of L layers, of one batch size and device; or the
            `FeatureTaps` that recorded them.
        mask: [N, 1, *S0] or [N, *S0], bool, integer {0, 1} or floating point in [0, 1], to within rounding;
            of several classes as `mode` says.
        convention: the reading of the paper, one of `fdkernels.CONVENTIONS`, or a `Convention`.
        exchange: the cross-sample term that is added: `"none"`; `"shuffle"`, the foreground of a random
            other sample; `"pooled"`, pairs of samples from two domains.
        pairing: the partners, drawn where not given: [N] for `"shuffle"`, the sample whose foreground is
            paired with background n; [K, 2] for `"pooled"`. Sample numbers are those of the group's batch.
        domains: [N] of 0 (base) and 1 (novel), from which `"pooled"` draws its pairs.
        generator: draws the pairs; None is torch's own generator.
        group: the ranks over whose samples pairs are made, however many each of them holds. The result, on
            every rank, is that of one process with the whole batch, and so is the gradient once
            DistributedDataParallel has averaged it.
        layer_weights: [L], α; weighted layers are added. Differentiable.
        mask_resize: `"area"`, `"max"` or `"nearest"`; None is the convention's own.
        aspect: `"same"` refuses a mask whose height and width, with room for what odd sizes, borders and
            anisotropic strides do, are not to each other as those of each layer; `"any"` resizes it all the
            same.
        channel_dim: the axis of the channels: 1, or -1 for features [N, *S, C].
        ignore_index: the mask value of pixels to leave out.
        mode: `"binary"`; `"multiclass"`, where the mask holds class indices, [N, *S0] or [N, 1, *S0], or a
            plane with values in [0, 1] for each class, [N, K, *S0]; `"multilabel"`, [N, K, *S0] where
            classes may overlap. Each class k has an entry L[n,k] as the foreground. Its background is the
            rest, the sum of the other classes' region sums (`"multilabel"`: of F under v·(1-w_k)). An entry
            counts where both hold pixels.
        num_classes: K; needed for class indices.
        include_background: False leaves the entries of class 0 out; it stays part of the rest.
        pairs: [(i, j), …] sets class i against class j in place of each class against the rest.
        eps: ε, at least 0.
        reduction: `"mean"` or `"sum"` over the entries that count; several layers without weights are
            averaged under `"mean"` and added under `"sum"`. `"none"` keeps the entries.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A scalar; under `reduction="none"` [N] for one layer and [N, L] for several, of several classes
        [N, K] and [N, L, K], times the weights if there are any (under a convention with `norm="batch"`,
        such as `"released"`: [C], for several layers side by side). float32, or float64 if any layer is.
        What does not count has the entry 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, value or name. Values are checked on the CPU and, elsewhere, under
            `fdkernels.debug()`.
        RuntimeError: the backend is not available.

    References:
        "Causal frameworks and feature discrepancy loss", eq. 1 and 2, Definitions 4 and 6, Algorithm 1; the
        later version is arXiv:2507.19575.
    """
    settings = settings_of(
        convention=convention,
        exchange=exchange,
        mask_resize=mask_resize,
        ignore_index=ignore_index,
        eps=eps,
        reduction=reduction,
        group=group,
        backend=backend,
        aspect=aspect,
        channel_dim=channel_dim,
        mode=mode,
        num_classes=num_classes,
        include_background=include_background,
        pairs=pairs,
    )
    inputs = check_inputs(features, mask, settings)
    partners = Partners(pairing, domains, generator)
    taps = features if isinstance(features, FeatureTaps) else None
    combines = layer_weights is None
    per_layer, _ = losses_per_layer(inputs, settings, partners, taps=taps, combines=combines)
    return _combine(per_layer, inputs.layers, layer_weights, reduction)


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
    aspect: str = "same",
    channel_dim: int = 1,
    ignore_index: float | None = None,
    mode: str = "binary",
    num_classes: int | None = None,
    include_background: bool = True,
    pairs: Sequence[tuple[int, int]] | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Features, Tensor]:
    """Pass features through unchanged and compute their loss, with one shared backward pass.

    `out, loss = tap(features, mask)` gives the numbers of::

        out, loss = features, feature_discrepancy_loss(features, mask)

    Use `out` in place of `features` in the rest of the network: backward then reads the upstream gradient
    once and writes its sum with the loss's gradient once. Without the tap the loss writes a gradient, and
    autograd reads both and writes their sum.

    Args:
        features: [N, C, *S] or a sequence of them, as for `feature_discrepancy_loss`.
        mask: [N, 1, *S0] or [N, *S0], as for `feature_discrepancy_loss`; so are all others.

    Returns:
        The features in the shape they came in, not copied (a list for a sequence), and the loss, a scalar or
        the entries.

    Raises:
        TypeError, ValueError, RuntimeError: as for `feature_discrepancy_loss`.
    """
    settings = settings_of(
        convention=convention,
        exchange=exchange,
        mask_resize=mask_resize,
        ignore_index=ignore_index,
        eps=eps,
        reduction=reduction,
        group=group,
        backend=backend,
        aspect=aspect,
        channel_dim=channel_dim,
        mode=mode,
        num_classes=num_classes,
        include_background=include_background,
        pairs=pairs,
    )
    inputs = check_inputs(features, mask, settings)
    layers = inputs.layers
    partners = Partners(pairing, domains, generator)
    combines = layer_weights is None
    per_layer, tapped = losses_per_layer(inputs, settings, partners, tapped=True, combines=combines)
    if layers[0].dim() - 1 == channel_dim % layers[0].dim():
        tapped = [layer.movedim(1, -1) for layer in tapped]
    loss = _combine(per_layer, layers, layer_weights, reduction)
    return (tapped[0] if isinstance(features, Tensor) else tapped), loss


def _combine(
    per_layer: Tensor,
    layers: Sequence[Tensor],
    layer_weights: Tensor | Sequence[float] | None,
    reduction: str,
) -> Tensor:
    """Weigh and reduce the losses [L], or entries [N, L], [N, L, E] or [ΣC], to the result of a call.

    A number [] is the result already.
    """
    if per_layer.dim() == 0:
        return per_layer
    weights = checks.check_layer_weights(layer_weights, layers)
    if weights is not None:
        weights = weights.to(per_layer.dtype)
        if per_layer.dim() == 1 and reduction == "none":
            weights = expand_factor(weights, describe(layers))
        per_layer = per_layer * (weights.unsqueeze(-1) if per_layer.dim() == 3 else weights)
    if reduction == "none":
        return per_layer.squeeze(1) if per_layer.dim() > 1 and len(layers) == 1 else per_layer
    if per_layer.shape[0] == 1:
        return per_layer.squeeze(0)
    return per_layer.mean() if reduction == "mean" and weights is None else per_layer.sum()


class RegionSums(NamedTuple):
    """Region sums of one layer, (R2) in op/README.md.

    Attributes:
        fg, bg: [N, C], the features summed under the foreground and the background weight; of several
            classes [N, K, C], each class and the rest.
        fg_mass, bg_mass: [N], or [N, K], the weights summed.
    """

    fg: Tensor
    bg: Tensor
    fg_mass: Tensor
    bg_mass: Tensor


def region_sums(
    features: Tensor | Sequence[Tensor],
    mask: Tensor,
    *,
    mask_resize: str = "area",
    aspect: str = "same",
    channel_dim: int = 1,
    ignore_index: float | None = None,
    mode: str = "binary",
    num_classes: int | None = None,
    include_background: bool = True,
    pairs: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> RegionSums | list[RegionSums]:
    """Sum features over the foreground and over the background, in one read of them.

    S_fg[n,c] = Σ_p v·y·F, S_bg[n,c] = Σ_p v·(1-y)·F, M_fg[n] = Σ_p v·y, M_bg[n] = Σ_p v·(1-y), with the mask
    y and the validity v at the layer's size. Differentiable with respect to features and soft masks. For one
    layer of the mask's size, it replaces::

        fg = (features * mask).flatten(2).sum(-1)
        bg = (features * (1 - mask)).flatten(2).sum(-1)

    Args:
        features: [N, C, *S] with 1 to 3 spatial dimensions, float32, float64, bfloat16 or float16, in any
            layout; or a sequence of them, one for each layer, of one batch size and device.
        mask: [N, 1, *S0] or [N, *S0], bool, integer {0, 1} or floating point in [0, 1], up to rounding.
        mask_resize: how the mask is resized to a layer, `"area"`, `"max"` or `"nearest"`.
        aspect, channel_dim, mode, num_classes, include_background, pairs: as for
            `feature_discrepancy_loss`; so is the mask of several classes.
        ignore_index: the mask value of pixels to leave out.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A `RegionSums` of float32 (float64 if any layer is float64), or a list of them for a sequence.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, value or name.
        RuntimeError: the backend is not available.
    """
    checks.one_of("mask_resize", mask_resize, MASK_RESIZES)
    settings = settings_of(
        convention="paper",
        exchange="none",
        mask_resize=mask_resize,
        ignore_index=ignore_index,
        eps=0.0,
        reduction="none",
        group=None,
        backend=backend,
        aspect=aspect,
        channel_dim=channel_dim,
        mode=mode,
        num_classes=num_classes,
        include_background=include_background,
        pairs=pairs,
    )
    inputs = check_inputs(features, mask, settings)
    sums, masses = region_sums_of(inputs, settings)
    results = [
        RegionSums(part[0], part[1], masses[0, ..., index], masses[1, ..., index])
        for index, part in enumerate(sums.split(inputs.plan.pyramid.channels, dim=-1))
    ]
    return results[0] if isinstance(features, Tensor) else results
