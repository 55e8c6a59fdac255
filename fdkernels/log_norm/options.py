"""The options of stage `log_norm`, in the one form that all backends take."""

from __future__ import annotations

from typing import NamedTuple

# The position of a name is its code in csrc/log_norm.h.
REGION_WEIGHTS = ("valid", "none", "region", "pixels")
NORMS = ("vector", "channel_sum", "relative", "batch")
EXCHANGES = ("none", "shuffle", "pooled")
REDUCTIONS = ("none", "mean", "sum")


class Options(NamedTuple):
    """How sums become a loss; the symbols are those of README.md beside this file.

    Args:
        region_weight: what divides the sums (L1), one of `REGION_WEIGHTS`.
        masked_background: whether the background sum is replaced by M_fg - S_fg.
        norm: the distance of a pair (L2) or over the batch (L6), one of `NORMS`.
        log_scale: s in (L3), 1 for the squared norm and 0.5 for the norm.
        eps: ε, added to the distance before the logarithm.
        exchange: the cross-sample term, one of `EXCHANGES`.
        reduction: how the entries of a layer become its loss, one of `REDUCTIONS`.
    """

    region_weight: str
    masked_background: bool
    norm: str
    log_scale: float
    eps: float
    exchange: str
    reduction: str
