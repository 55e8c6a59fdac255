"""The sample pairs of the exchange term, and sums gathered over a group of ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fdkernels import checks
from fdkernels.transforms import in_transform, innermost


def draw_pairing(
    exchange: str,
    batch: int,
    device: torch.device,
    pairing: Tensor | None,
    domains: Tensor | None,
    generator: torch.Generator | None,
    ranks: Ranks | None = None,
) -> Tensor | None:
    """The checked or drawn partners of the exchange term.

    Args:
        exchange: `"none"`, `"shuffle"` or `"pooled"`.
        batch: N, over all ranks of the group.
        device: where the features are.
        pairing: given partners, [N] or [K, 2]; None draws them.
        domains: [N] of {0, 1}, needed to draw pairs under `"pooled"`.
        generator: where the random numbers come from; None is torch's own.
        ranks: those that share the batch; the first of them draws for all.

    Returns:
        None for `"none"`; int64 [N] for `"shuffle"`, the sample whose foreground meets background n; int64
        [K, 2] for `"pooled"`, rows with -1 being unused.
    """
    _check_generator(generator)
    if exchange == "none":
        return None
    _check_batch(exchange, batch)
    if pairing is not None:
        checked = _check_pairing(pairing, exchange, batch, device)
        if exchange == "pooled" and domains is not None:
            _check_pairs_cross(checked, _check_domains(domains, batch, device))
        return checked
    if exchange == "shuffle":
        drawn = _permutation(batch, device, generator)
    else:
        drawn = _cross_pairs(_check_domains(domains, batch, device), generator)
    if ranks is not None:
        dist.broadcast(drawn, src=dist.get_global_rank(ranks.group, 0), group=ranks.group)
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


def _check_pairing(pairing: object, exchange: str, batch: int, device: torch.device) -> Tensor:
    """Validate the pairing and return it as int64 on `device`.

    Args:
        pairing: the partner of each sample, [N], for `exchange="shuffle"`; pairs of a base and a novel
            sample, [K, 2], for "pooled".
        exchange: "shuffle" or "pooled".
        batch: N, the number of samples.
        device: device of the result.

    Raises:
        TypeError: the pairing is not a tensor or list of integers.
        ValueError: its shape is wrong or, where readable, an index is outside 0 to N - 1.
    """
    if isinstance(pairing, (list, tuple)):
        pairing = torch.as_tensor(pairing, device="cpu")
    if not isinstance(pairing, Tensor):
        raise TypeError(f"pairing must be a tensor or a list of sample indices, got {type(pairing).__name__}")
    if pairing.dtype.is_floating_point or pairing.dtype.is_complex or pairing.dtype == torch.bool:
        raise TypeError(f"pairing must contain integers, got {checks.short(pairing.dtype)}")
    if exchange == "shuffle" and pairing.shape != (batch,):
        raise ValueError(
            f"pairing must have shape [{batch}], one partner for each sample, got {list(pairing.shape)}"
        )
    if exchange == "pooled" and (pairing.dim() != 2 or pairing.shape[1] != 2 or not pairing.shape[0]):
        raise ValueError(
            f"pairing must have shape [K, 2], pairs of a base and a novel sample, got {list(pairing.shape)}"
        )
    if pairing.numel() and checks.values_are_readable(pairing):
        low, high = (int(bound.item()) for bound in innermost(pairing).aminmax())
        if low < 0 or high >= batch:
            raise ValueError(
                f"pairing must contain sample indices from 0 to {batch - 1}, got values from {low} to {high}"
            )
    return pairing.to(device=device, dtype=torch.int64, non_blocking=True)


def _check_generator(generator: object) -> None:
    """Raise TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "to pass a seed, use torch.Generator().manual_seed(seed)"
        )


def _check_domains(domains: object, batch: int, device: torch.device) -> Tensor:
    """Validate the domains and return them as int64 [N] on `device`: 0 is base, 1 is novel.

    Raises:
        TypeError: the domains are not a bool or integer tensor or list.
        ValueError: they are missing, not [N] with N = `batch`, or, where readable, contain another
            value or only one of the two domains.
    """
    if domains is None:
        raise ValueError(
            "domains must be given for exchange='pooled' without a pairing: "
            "a tensor [N] of 0 (base) and 1 (novel), got None"
        )
    if isinstance(domains, (list, tuple)):
        domains = torch.tensor(domains, device="cpu")
    if not isinstance(domains, Tensor):
        raise TypeError(f"domains must be a tensor or a list, got {type(domains).__name__}")
    if domains.dtype.is_floating_point or domains.dtype.is_complex:
        raise TypeError(f"domains must be bool or integer, got {checks.short(domains.dtype)}")
    if domains.shape != (batch,):
        raise ValueError(
            f"domains must have shape [{batch}], one entry for each sample, got {list(domains.shape)}"
        )
    if checks.values_are_readable(domains) and not in_transform():
        found = sorted(set(domains.tolist()))
        if not set(found) <= {0, 1}:
            raise ValueError(f"domains must contain only 0 (base) and 1 (novel), got the values {found}")
        if len(found) < 2:
            only = "base samples (0)" if not found or not found[0] else "novel samples (1)"
            raise ValueError(
                f"domains must include base and novel samples for exchange='pooled', got only {only}"
            )
    return domains.to(device=device, dtype=torch.int64, non_blocking=True)


def _check_pairs_cross(pairing: Tensor, domains: Tensor) -> None:
    """Raise ValueError if a pair of `pairing` [K, 2] joins two samples of one domain (`domains` [N])."""
    if (
        checks.values_are_readable(pairing)
        and not in_transform()
        and (domains[pairing[:, 0]] == domains[pairing[:, 1]]).any()
    ):
        raise ValueError("pairing must join samples of different domains, got a pair of one domain")


def _check_batch(exchange: str, batch: int) -> None:
    """Raise ValueError for a batch of fewer than two samples."""
    if batch < 2:
        raise ValueError(
            f"exchange={exchange!r} pairs samples, so the batch must have at least 2, got {batch}; "
            "drop the last incomplete batch or use exchange='none'"
        )


class Ranks(NamedTuple):
    """The ranks whose samples are one batch.

    Attributes:
        group: the ranks.
        sizes: the number of samples of each.
    """

    group: dist.ProcessGroup
    sizes: tuple[int, ...]

    @classmethod
    def even(cls, group: dist.ProcessGroup, batch: int) -> Ranks:
        """Ranks that are known to hold `batch` samples each."""
        return cls(group, (batch,) * dist.get_world_size(group))

    @property
    def total(self) -> int:
        """The samples of all ranks."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """The place of this rank's samples."""
        rank = dist.get_rank(self.group)
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])


def ranks_of(group: dist.ProcessGroup | None, batch: int, device: torch.device) -> Ranks | None:
    """Tell the ranks of a group from one another's number of samples; None without a group.

    Reading them is a synchronisation on devices other than the CPU: gathered tensors and drawn pairs have
    sizes that depend on them.
    """
    if group is None:
        return None
    own = torch.tensor([batch], device=device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    return Ranks(group, tuple(torch.cat(sizes).tolist()))


class _GatherBatch(torch.autograd.Function):
    """[K, N, X] of every rank as [K, ΣN, X], ranks in order; backward sums every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Ranks) -> Tensor:
        """Gather `local` [K, N, X] from all ranks."""
        ctx.ranks = ranks
        # Collectives take tensors of one size: smaller batches are padded to the largest.
        most = max(ranks.sizes)
        rows = local.new_zeros((local.shape[0], most, *local.shape[2:]))
        rows[:, : local.shape[1]] = local
        parts = [torch.empty_like(rows) for _ in ranks.sizes]
        dist.all_gather(parts, rows, group=ranks.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, ranks.sizes, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Add up the gradients [K, ΣN, X] of all ranks and keep the rows of this one."""
        return reduce_batch(grad, ctx.ranks), None


def gather_batch(local: Tensor, ranks: Ranks) -> Tensor:
    """Region sums [K, N, ΣC] or masses [K, N, L] of all ranks, [K, ΣN, …]; differentiable.

    Features never travel: only these O(N·C) numbers do.
    """
    gathered: Tensor = _GatherBatch.apply(local, ranks)
    return gathered


def reduce_batch(gathered: Tensor, ranks: Ranks) -> Tensor:
    """Add up [K, ΣN, X] over the ranks and keep this rank's rows [K, N, X], as the gradient is gathered."""
    total = gathered.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=ranks.group)
    return total[:, ranks.own]
