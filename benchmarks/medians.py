"""The interval that belongs to a median of ratios, for the benchmarks beside this file."""
from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binom


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    "95 % interval of the median by order statistics; the extremes when there are fewer than six"
    r, n = sorted(ratios), len(ratios)
    k = int(binom.ppf(.025, n, .5))                                   # P(fewer than k below the median) <= 0.025
    return r[max(k - 1, 0)], r[n - max(k, 1)]
