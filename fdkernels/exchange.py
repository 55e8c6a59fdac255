"""The sample pairs of the exchange term, and sums gathered over a group of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdkernels import checks


def draw_pairing(
    exchange: str,
    batch: int,
    device: torch.device,
    pairing: Tensor | None,
    domains: Tensor | None,
    generator: torch.Generator | None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | None:
    """The checked or drawn partners of the exchange term.

    Args:
        exchange: `"none"`, `"shuffle"` or `"pooled"`.
        batch: N, over all ranks of the group.
        device: where the features are.
        pairing: given partners, [N] or [K, 2]; None draws them.
        domains: [N] of {0, 1}, needed to draw pairs under `"pooled"`.
        generator: where the random numbers come from; None is torch's own.
        group: the ranks that share the batch; the first of them draws for all.

    Returns:
        None for `"none"`; int64 [N] for `"shuffle"`, the sample whose foreground meets background n; int64
        [K, 2] for `"pooled"`, rows with -1 being unused.
    """
    checks.one_of("exchange", exchange, ("none", "shuffle", "pooled"))
    checks.check_exchange_batch(exchange, batch)
    checks.check_generator(generator)
    if exchange == "none":
        return None
    if pairing is not None:
        checked = checks.check_pairing(pairing, exchange, batch, device)
        if exchange == "pooled" and domains is not None:
            checks.check_pairs_cross(checked, checks.check_domains(domains, batch, device))
        return checked
    if exchange == "shuffle":
        drawn = _permutation(batch, device, generator)
    else:
        drawn = _cross_pairs(checks.check_domains(domains, batch, device), generator)
    if group is not None:
        dist.broadcast(drawn, src=dist.get_global_rank(group, 0), group=group)
    return drawn


def _permutation(batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.randperm(batch, device=device)
    drawn = torch.randperm(batch, generator=generator, device=generator.device)
    return drawn.to(device, non_blocking=True)


def _cross_pairs(domains: Tensor, generator: torch.Generator | None) -> Tensor:
    """Pairs [N, 2] of a base and a novel sample: both sides shuffled, the smaller repeated, the rest -1.

    How many there are, max(N_base, N_novel), stays on the device: reading it would synchronise.
    """
    batch = domains.shape[0]
    order = _permutation(batch, domains.device, generator)
    # By gather: torch 2.13's inductor takes domains[order] for a pattern of its own, and fails on it.
    order = order.gather(
        0, domains.gather(0, order).argsort(stable=True)
    )  # base samples first, both shuffled
    k = torch.arange(batch, device=domains.device)
    novel = domains.sum()
    base = batch - novel
    pairs = torch.stack(
        [order[k % base.clamp(min=1)], order[(base + k % novel.clamp(min=1)).clamp(max=batch - 1)]],
        dim=-1,
    )
    used = (k < torch.maximum(base, novel)) & (base > 0) & (novel > 0)
    return torch.where(used.unsqueeze(-1), pairs, -1)


class _GatherBatch(torch.autograd.Function):
    """[2, N, X] of every rank as [2, R·N, X], ranks in order; backward sums every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Gather `local` [2, N, X] from all ranks."""
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Add up the gradients [2, R·N, X] of all ranks and keep the rows of this one."""
        return reduce_batch(grad, ctx.group), None


def gather_batch(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Region sums [2, N, ΣC] or masses [2, N, L] of all ranks, [2, R·N, …]; differentiable.

    Every rank must hold the same number of samples. Features never travel: only these O(N·C) numbers do.
    """
    gathered: Tensor = _GatherBatch.apply(local, group)
    return gathered


def reduce_batch(gathered: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add up [2, R·N, X] over the ranks and keep this rank's rows [2, N, X], as the gradient is gathered."""
    total = gathered.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return total.chunk(world, dim=1)[rank]
