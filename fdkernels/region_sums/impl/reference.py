"""Backend `reference` of region_sums: the specification in plain PyTorch, for any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdkernels.region_sums.geometry import Geometry, accumulate_dtype

__all__ = ["backward", "forward"]


def forward(features: Sequence[Tensor], fg: Sequence[Tensor], bg: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums [2, N, ΣC] and masses [2, N, L] by (R2)."""
    dtype = accumulate_dtype(features)
    sums, masses = [], []
    for index, layer in enumerate(features):
        w = _weights(fg, bg, index, dtype)  # [2, N, P]
        F = layer.flatten(2).to(dtype)  # [N, C, P]
        if bg:
            F = torch.where(_valid(w).unsqueeze(1), F, 0)
        sums.append(torch.stack([(F * w_k.unsqueeze(1)).sum(-1) for w_k in w]))  # [2, N, C]
        masses.append(w.sum(-1))  # [2, N]
    return torch.cat(sums, dim=-1), torch.stack(masses, dim=-1)


def backward(
    grad_sums: Tensor,
    fg: Sequence[Tensor],
    bg: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    features: Sequence[Tensor],
    geometry: Sequence[Geometry],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients (R3) for the layers of `geometry` and (R4) for the masks of `features`."""
    dtype = grad_sums.dtype
    grad_features, grad_fg, grad_bg = [], [], []
    start = 0
    for index, (shape, stride, feature_dtype) in enumerate(geometry):
        w = _weights(fg, bg, index, dtype)
        g = grad_sums[..., start : start + shape[1]]  # [2, N, C]
        start += shape[1]
        grad = (g.unsqueeze(-1) * w.unsqueeze(2)).sum(0)  # [N, C, P]
        if bg:
            grad = torch.where(_valid(w).unsqueeze(1), grad, 0)
        grad = grad.reshape(shape)
        added = upstream[index] if upstream else None
        if added is not None:
            grad = grad + added
        out = torch.empty_strided(shape, stride, dtype=feature_dtype, device=grad.device)
        grad_features.append(out.copy_(grad))
    start = 0
    for index, layer in enumerate(features):
        F = layer.flatten(2).to(dtype)
        g = grad_sums[..., start : start + F.shape[1]]
        start += F.shape[1]
        if not bg:
            grad_fg.append(((g[0] - g[1]).unsqueeze(-1) * F).sum(1))  # [N, P]
            continue
        F = torch.where(_valid(_weights(fg, bg, index, dtype)).unsqueeze(1), F, 0)
        grad_fg.append((g[0].unsqueeze(-1) * F).sum(1))
        grad_bg.append((g[1].unsqueeze(-1) * F).sum(1))
    return grad_features, grad_fg, grad_bg


def _weights(fg: Sequence[Tensor], bg: Sequence[Tensor], index: int, dtype: torch.dtype) -> Tensor:
    w_fg = fg[index].to(dtype)
    w_bg = bg[index].to(dtype) if bg else 1 - w_fg
    return torch.stack([w_fg, w_bg])


def _valid(weights: Tensor) -> Tensor:
    return (weights != 0).any(0)
