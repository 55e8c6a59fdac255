"""Example 3 by simulation: X -> Z -> Y, and the conditional distributions that it states.

    X ~ N(0, 1)    Z = a X + e1    Y = b Z + e2    e1, e2 ~ N(0, 1), independent

stated:  Z | X ~ N(a X, 1)    Y | Z ~ N(b Z, 1)    Y | X ~ N(a b X, 1 + b²)    X and Y independent given Z
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from fdkernels.segmentation.experiments.effects import fisher_interval
from fdkernels.segmentation.experiments.plan import Experiment, Study

DRAWS = 100_000
COEFFICIENTS = ((1.0, 1.0), (2.0, -0.5), (0.0, 1.0), (0.5, 3.0))
# Values of X at which Y | X is drawn through Z and compared with the stated distribution.
GIVEN = (-2.0, 0.0, 1.0)


def results(study: Study) -> dict[str, Any]:
    """Simulate for each seed and pair (a, b); see `simulate`."""
    return {
        "draws": DRAWS,
        "simulations": [simulate(a, b, seed, DRAWS) for seed in study.seeds for a, b in COEFFICIENTS],
    }


def simulate(a: float, b: float, seed: int, draws: int) -> dict[str, Any]:
    """Draw X, Z and Y, and estimate the conditional distributions.

    Returns:
        "distributions" by name ("Z|X", "Y|Z", "Y|X"): the stated and estimated "slope" and "variance", the
        95 % interval of each estimate, and the Kolmogorov-Smirnov test "p" of the residuals against the
        stated normal distribution; "independence": the partial correlation of X and Y given Z with its 95 %
        interval; "mixture": for each value x of X, the test "p" of Y drawn through Z | X = x against
        N(a b x, 1 + b²), the integral of proposition 2.
    """
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(draws)
    z = a * x + draw.standard_normal(draws)
    y = b * z + draw.standard_normal(draws)
    mixture = []
    for given in GIVEN:
        through = b * (a * given + draw.standard_normal(draws)) + draw.standard_normal(draws)
        stated = stats.norm(a * b * given, math.sqrt(1 + b**2))
        mixture.append(
            {"x": given, "mean": float(through.mean()), "variance": float(through.var(ddof=1))}
            | {"p": float(stats.kstest(through, stated.cdf).pvalue)}
        )
    return {
        "a": a,
        "b": b,
        "seed": seed,
        "distributions": {
            "Z|X": _conditional(x, z, a, 1.0),
            "Y|Z": _conditional(z, y, b, 1.0),
            "Y|X": _conditional(x, y, a * b, 1 + b**2),
        },
        "independence": _partial(x, y, z),
        "mixture": mixture,
    }


def _conditional(given: np.ndarray, values: np.ndarray, slope: float, variance: float) -> dict[str, Any]:
    """Estimate slope and variance of values ~ N(slope · given, variance), without intercept."""
    count = len(given)
    square = float(given @ given)
    found = float(given @ values) / square
    rest = float(((values - found * given) ** 2).sum())
    reach = float(stats.norm.ppf(0.975)) * math.sqrt(rest / (count - 1) / square)
    chi = stats.chi2.ppf([0.975, 0.025], count - 1)
    test = stats.kstest(values - slope * given, stats.norm(0, math.sqrt(variance)).cdf)
    return {
        "slope": {"stated": slope, "estimated": found, "interval": [found - reach, found + reach]},
        "variance": {
            "stated": variance,
            "estimated": rest / (count - 1),
            "interval": [float(rest / end) for end in chi],
        },
        "p": float(test.pvalue),
    }


def _partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> dict[str, Any]:
    """Correlate the residuals of x and y after a regression on `given`, with Fisher's interval."""
    rests = [stats.linregress(given, values) for values in (x, y)]
    left, right = (
        values - (line.slope * given + line.intercept) for values, line in zip((x, y), rests, strict=True)
    )
    r = float(stats.pearsonr(left, right).statistic)
    return {"r": r, "interval": fisher_interval(r, 1 / math.sqrt(len(x) - 4))}


MEDIATION = Experiment(
    "mediation",
    "The conditional distributions of example 3, by simulation; needs no data.",
    lambda config, novel_images: [],
    results,
    sets=(),
)

__all__ = ["COEFFICIENTS", "DRAWS", "GIVEN", "MEDIATION", "results", "simulate"]
