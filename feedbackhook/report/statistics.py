"""Mean errors over seeds with intervals, and paired tests with a correction for their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
LEVEL = 0.05
LEAST_PAIRS = 6
"""Number of differing pairs that a signed-rank test needs to reach 0.05: its smallest p of n is 2 / 2^n."""


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval; NaN if there are too few values."""

    mean: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """Wilcoxon's two-sided signed-rank test of paired values, without the pairs that do not differ.

    ``difference`` is the median of first minus second. ``p`` is None with fewer than `LEAST_PAIRS` differing
    pairs. ``effect`` is the matched-pairs rank-biserial correlation (Kerby 2014), from -1 (the first is
    smaller in each pair) to 1; None if no pair differs.
    """

    pairs: int
    differing: int
    difference: float
    p: float | None
    effect: float | None


def interval(values: ArrayLike) -> Interval:
    """Return the mean of n values without bounds, and its interval by Student's t."""
    mean, half = _mean_and_half(values)
    return Interval(mean, mean - half, mean + half)


def percent_interval(values: ArrayLike) -> Interval:
    """Return the mean m of n percentages, such as errors, and its interval, which stays within 0 and 100.

    Student's interval for the logit of the mean, logit(m) ± t s / (sqrt(n) m (1 - m)) with m and the standard
    deviation s as shares, mapped back by the inverse of the logit: the "xlogit" interval of R's
    `survey::svyciprop`; see docs/intervals.md for its coverage. For a small spread it is Student's interval.
    Values that do not vary give an interval of width 0.

    Raises:
        ValueError: a value is not between 0 and 100.
    """
    from scipy.special import expit, logit

    shares = np.asarray(values, float) / 100
    if ((shares < 0) | (shares > 1)).any():
        found = f"{100 * shares.min():g} to {100 * shares.max():g}"
        raise ValueError(f"percentages must lie between 0 and 100, but these go from {found}")
    mean, half = _mean_and_half(shares)
    if not half > 0:  # also where it is NaN; a mean of 0 or 1 is among these
        return Interval(100 * mean, 100 * (mean - half), 100 * (mean + half))
    half /= mean * (1 - mean)
    low, high = expit(logit(mean) + np.array([-half, half]))
    return Interval(100 * mean, 100 * float(low), 100 * float(high))


def _mean_and_half(values: ArrayLike) -> tuple[float, float]:
    """Mean, and half the width of its interval by Student's t."""
    from scipy.stats import t

    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else np.nan
    if len(values) < 2:
        return mean, np.nan
    standard_error = values.std(ddof=1) / np.sqrt(len(values))
    return mean, float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * standard_error)


def paired_test(first: ArrayLike, second: ArrayLike) -> PairedTest:
    """Test two lists of n values; the i-th values of both are a pair."""
    from scipy.stats import rankdata, wilcoxon

    # rounded, so that errors that differ only by the order of a sum are ties
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number m by Holm's method (Holm 1979), in the order given.

    With p sorted, the i-th smallest becomes the largest of min(1, (m - j + 1) p_j) for j = 1 to i.
    Rejecting where the corrected p is below a level keeps the probability of any wrong rejection below that
    level, whatever the dependence between the tests.
    """
    count, largest = len(p_values), 0.0
    corrected = [0.0] * count
    for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
