"""The two stages one after the other, for a backend that has no kernel for both together."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fdkernels.log_norm.options import Options
from fdkernels.region_sums.geometry import Geometry

__all__ = ["backward", "forward"]


def forward(
    region_sums: ModuleType,
    log_norm: ModuleType,
    features: Sequence[Tensor],
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    pairing: Tensor | None,
    options: Options,
    with_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [L], sums, masses, and the slopes (F1) [2, N, ΣC] (empty where not asked for)."""
    sums, masses = region_sums.forward(features, fg, bg)
    channels = [layer.shape[1] for layer in features]
    pixels = [layer.shape[2:].numel() for layer in features]
    loss: Tensor = log_norm.forward(sums, masses, pairing, channels, pixels, options)
    if not with_slopes:
        return loss, sums, masses, sums.new_empty(0)
    slopes, _ = log_norm.backward(torch.ones_like(loss), sums, masses, pairing, channels, pixels, options)
    return loss, sums, masses, slopes


def backward(
    region_sums: ModuleType,
    grad_loss: Tensor,
    slopes: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    geometry: Sequence[Geometry],
) -> list[Tensor]:
    """The gradients of the features (F2): grad_loss [L] times the slopes, through (R3)."""
    channels = torch.tensor([layer.shape[1] for layer in geometry], device=grad_loss.device)
    scale = grad_loss.repeat_interleave(channels, output_size=slopes.shape[-1])  # [ΣC]
    grads: list[Tensor] = region_sums.backward(slopes * scale, fg, bg, upstream, [], geometry)[0]
    return grads
