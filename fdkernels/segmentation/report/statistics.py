"""Correlations with their intervals by a bootstrap over patients, and regression lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fdkernels.segmentation.comparison import DRAWS, SEED, SHARE


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute Pearson's r; None for fewer than two values, or where either is the same for all."""
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))[0, 1])


def correlation_interval(
    x: Sequence[float], y: Sequence[float], patients: Sequence[str]
) -> tuple[float, float] | None:
    """Compute the 95 % interval of Pearson's r by a bootstrap over patients.

    Draws as many patients as there are, with replacement and all samples of each, as
    `comparison.interval` does.

    Returns:
        The two ends; None for fewer than three patients, or where r is not defined.
    """
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 3 or correlation(x, y) is None:
        return None
    # r depends neither on place nor on scale; at unit scale no digits are lost.
    a, b = ((one - one.mean()) / one.std() for one in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    terms = [np.bincount(patient, term) for term in (np.ones_like(a), a, b, a * a, b * b, a * b)]  # [P] each
    count = len(names)
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), DRAWS)  # [DRAWS, P]
    n, sa, sb, saa, sbb, sab = (drawn @ np.stack(terms, axis=1)).T  # [DRAWS] each
    spread = (n * saa - sa**2) * (n * sbb - sb**2)
    kept = spread > 1e-12 * n**4  # a draw of one patient over and over may have no spread
    if not kept.any():
        return None
    found = (n * sab - sa * sb)[kept] / np.sqrt(spread[kept])
    low, high = np.quantile(found, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def regression(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Fit y = slope · x + intercept by least squares; None where x is the same for all."""
    if correlation(x, y) is None:
        return None
    slope, intercept = np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), 1)
    return float(slope), float(intercept)


__all__ = ["correlation", "correlation_interval", "regression"]
