"""The published readings of the loss as data, and every name that an option can have.

The paper states its loss in several forms that do not agree with one another. Each is a frozen
dataclass here, so that a run names the one it uses and a user can build another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fdkernels.checks import one_of

# The compiled module names its codes alike; fdkernels/op/packing.py compares the two at import.
REGION_WEIGHTS = ("valid", "none", "region", "pixels")
# Those of which the loss kernels make losses, and one of second moments, whose loss torch computes.
KERNEL_NORMS = ("vector", "channel_sum", "relative", "batch")
NORMS = (*KERNEL_NORMS, "fisher")
EXCHANGES = ("none", "shuffle", "pooled")
REDUCTIONS = ("none", "mean", "sum")
MASK_RESIZES = ("area", "max", "nearest")


class Options(NamedTuple):
    """How region sums become a loss, whole from the public function to the kernels; op/README.md derives it.

    Args:
        region_weight: the divisor of the sums (L1), one of `REGION_WEIGHTS`.
        masked_background: whether M_fg - S_fg replaces the background sum.
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

    def as_text(self) -> str:
        """The options as one argument of a registered op; `from_text` reads them back exactly."""
        return (
            f"{self.region_weight} {int(self.masked_background)} {self.norm} {self.log_scale!r} {self.eps!r} "
            f"{self.exchange} {self.reduction}"
        )

    @classmethod
    def from_text(cls, text: str) -> Options:
        """The inverse of `as_text`."""
        region_weight, masked_background, norm, log_scale, eps, exchange, reduction = text.split()
        return cls(
            region_weight, masked_background == "1", norm, float(log_scale), float(eps), exchange, reduction
        )


@dataclass(frozen=True)
class Convention:
    """How the region sums of a layer become its loss, L = -log_scale · log(D + ε).

    Args:
        name: what the convention is called in messages and logs.
        region_weight: what divides the sums S to region features f and b: `"valid"` (the number of
            valid pixels, V), `"none"` (1), `"region"` (the mass of the region itself; samples with an
            empty region are left out) or `"pixels"` (the number of pixels, P).
        norm: the discrepancy D: `"vector"`, Σ_c (f-b)²; `"channel_sum"`, (Σ_c (f-b))²; `"relative"`,
            (Σ_c (f-b))² / ((Σ_c (f+b))² + ε); `"batch"`, D[c] = Σ_n (f-b)², one loss for each channel;
            `"fisher"`, Σ_c (f-b)² / (Σ_c (u_fg+u_bg) + ε) with the variances u within the regions, whose
            features must be means (`region_weight="region"`, no masked background).
        log_scale: 1 where the loss is the logarithm of the squared norm, 0.5 where of the norm.
        masked_background: whether the background is y·(1-F), as in the authors' code, and not (1-y)·F.
        mask_resize: how the mask is resized to a layer unless the call says otherwise.

    Raises:
        ValueError: a name that does not exist, a log_scale that is not positive, or a combination that has
            no meaning.
    """

    name: str
    region_weight: str = "valid"
    norm: str = "vector"
    log_scale: float = 1.0
    masked_background: bool = False
    mask_resize: str = "area"

    def __post_init__(self) -> None:
        one_of("region_weight", self.region_weight, REGION_WEIGHTS)
        one_of("norm", self.norm, NORMS)
        one_of("mask_resize", self.mask_resize, MASK_RESIZES)
        if not self.log_scale > 0:
            raise ValueError(f"log_scale must be positive, got {self.log_scale}")
        if self.norm == "fisher" and (self.region_weight != "region" or self.masked_background):
            raise ValueError(
                "norm='fisher' compares means of regions, so it needs region_weight='region' and "
                f"masked_background=False, got {self.region_weight!r} and {self.masked_background}"
            )

    def options(self, exchange: str, reduction: str, eps: float, factor: float = 1.0) -> Options:
        """The options of a call under this convention, whose losses are multiplied by a factor."""
        return Options(
            region_weight=self.region_weight,
            masked_background=self.masked_background,
            norm=self.norm,
            log_scale=float(self.log_scale) * factor,
            eps=float(eps),
            exchange=exchange,
            reduction=reduction,
        )


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("paper"),
        Convention("definition4", region_weight="none", norm="channel_sum"),
        Convention("algorithm1", log_scale=0.5),
        Convention("lemma7", region_weight="none", norm="relative", log_scale=0.5),
        Convention("region_mean", region_weight="region"),
        Convention(
            "released",
            region_weight="pixels",
            norm="batch",
            log_scale=0.5,
            masked_background=True,
            mask_resize="max",
        ),
        Convention("fisher", region_weight="region", norm="fisher", log_scale=0.5),
    )
}


def get_convention(convention: str | Convention) -> Convention:
    """The preset of that name, or the convention itself.

    Raises:
        TypeError: neither a string nor a `Convention`.
        ValueError: no preset has that name.
    """
    if isinstance(convention, Convention):
        return convention
    if not isinstance(convention, str):
        raise TypeError(
            f"convention must be a name or a fdkernels.Convention, got {type(convention).__name__}"
        )
    one_of("convention", convention, CONVENTIONS)
    return CONVENTIONS[convention]
