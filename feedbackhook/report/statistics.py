"""Means with their intervals, and a paired test, of errors over seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
LEVEL = 0.05
LEAST_PAIRS = 6
"""Pairs that differ, below which no signed-rank test is below 0.05: its smallest p of n pairs is 2 / 2^n."""


class Interval(NamedTuple):
    """A mean, and the ends of its 95% interval by Student's t; NaN where there are too few values."""

    mean: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """Wilcoxon's signed-rank test of paired values, two-sided; pairs that do not differ are left out.

    ``difference`` is the median of first less second. ``p`` is None with fewer than `LEAST_PAIRS` pairs that
    differ. ``effect`` is the matched-pairs rank-biserial correlation (Kerby 2014), from -1 (the first is
    smaller in each pair) to 1; None where no pair differs.
    """

    pairs: int
    differing: int
    difference: float
    p: float | None
    effect: float | None


def interval(values: ArrayLike) -> Interval:
    """The mean of n values and its interval."""
    from scipy.stats import t

    values = np.asarray(values, float)
    if len(values) == 0:
        return Interval(np.nan, np.nan, np.nan)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, np.nan, np.nan)
    standard_error = values.std(ddof=1) / np.sqrt(len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * standard_error)
    return Interval(mean, mean - half, mean + half)


def paired_test(first: ArrayLike, second: ArrayLike) -> PairedTest:
    """The test of two lists of n values, the i-th of each a pair."""
    from scipy.stats import rankdata, wilcoxon

    # rounded, so that equal errors that were summed in another order are ties
    differences = np.round(np.asarray(first, float) - np.asarray(second, float), 9)
    differing = differences[differences != 0]
    median = float(np.median(differences)) if len(differences) else np.nan
    effect = p = None
    if len(differing):
        ranks = rankdata(np.abs(differing))
        effect = float((ranks * np.sign(differing)).sum() / ranks.sum())
    if len(differing) >= LEAST_PAIRS:
        p = float(wilcoxon(differing).pvalue)
    return PairedTest(len(differences), len(differing), median, p, effect)
