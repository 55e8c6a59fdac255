"""Means over samples with their intervals, and correlations, by a bootstrap over patients and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
SHARE = 0.95
SEED = 0


def interval(
    values: Sequence[float], patients: Sequence[str], seeds: Sequence[int]
) -> tuple[float, float] | None:
    """Compute the 95 % interval of the mean of `values`.

    Draws patients with replacement, each with all its samples, and seeds with replacement, each with all
    its runs, 10,000 times: with u the number of times that a patient and w that a seed is drawn,

        mean = Σ u[patient] · w[seed] · value / Σ u[patient] · w[seed]

    and takes the 2.5 % and 97.5 % quantiles of these means. The draws are the same in each call.

    Args:
        values: one a sample and seed.
        patients: the patient of each; samples of one patient are not independent.
        seeds: the seed of each; a single seed is kept in every draw.

    Returns:
        The two ends, or None for fewer than two patients.
    """
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    numbers, seed = np.unique(np.asarray(seeds), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.zeros((len(numbers), len(names)))  # [S, P]
    counts = np.zeros_like(sums)
    np.add.at(sums, (seed, patient), np.asarray(values, dtype=np.float64))
    np.add.at(counts, (seed, patient), 1)
    generator = np.random.default_rng(SEED)
    u = _drawn(generator, len(names))  # [DRAWS, P]
    w = _drawn(generator, len(numbers))  # [DRAWS, S]
    total, weight = ((w @ part * u).sum(axis=1) for part in (sums, counts))  # [DRAWS]
    # A draw is empty where no seed that is drawn has a patient that is drawn.
    return _ends(total[weight > 0] / weight[weight > 0])


def _drawn(generator: np.random.Generator, count: int) -> np.ndarray:
    """Count how often each of `count` is drawn, [DRAWS, count]."""
    return generator.multinomial(count, np.full(count, 1 / count), DRAWS)


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute Pearson's r; None for fewer than two values, or where either is the same for all."""
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))[0, 1])


def correlation_interval(
    x: Sequence[float], y: Sequence[float], patients: Sequence[str]
) -> tuple[float, float] | None:
    """Compute the 95 % interval of Pearson's r by the bootstrap of `interval`, over patients.

    Returns:
        The two ends; None for fewer than three patients, or where r is not defined.
    """
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 3 or correlation(x, y) is None:
        return None
    # r depends neither on place nor on scale; at unit scale no digits are lost.
    a, b = ((one - one.mean()) / one.std() for one in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    terms = [np.bincount(patient, term) for term in (np.ones_like(a), a, b, a * a, b * b, a * b)]  # [P] each
    drawn = _drawn(np.random.default_rng(SEED), len(names)) @ np.stack(terms, axis=1)  # [DRAWS, 6]
    n, sa, sb, saa, sbb, sab = drawn.T
    spread = (n * saa - sa**2) * (n * sbb - sb**2)
    kept = spread > 1e-12 * n**4  # a draw of one patient over and over may have no spread
    if not kept.any():
        return None
    return _ends(((n * sab - sa * sb)[kept]) / np.sqrt(spread[kept]))


def regression(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Fit y = slope · x + intercept by least squares; None where x is the same for all."""
    if correlation(x, y) is None:
        return None
    slope, intercept = np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), 1)
    return float(slope), float(intercept)


__all__ = ["correlation", "correlation_interval", "interval", "regression"]
