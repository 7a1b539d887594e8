"""How often does a 95% interval over seeds contain the true mean error? A simulation, not a measurement.

    python benchmarks/interval_coverage.py

Draws errors of 2, 3, 5 and 10 seeds from known distributions, 100,000 times each, and prints as Markdown the
share of intervals that contain the true mean: Student's, the percentile bootstrap's (1,000 resamples, only
for the first 4,000 draws) and that of the tables, `feedbackhook.report.statistics.percent_interval`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import t

Errors = NDArray[np.float64]
DRAWS, BOOTSTRAPPED, RESAMPLES = 100_000, 4_000, 1_000
SEEDS = (2, 3, 5, 10)
RNG = np.random.default_rng(0)

DISTRIBUTIONS: dict[str, tuple[float, Callable[[int], Errors]]] = {
    "1.5%, normal, deviation 0.1": (0.015, lambda n: RNG.normal(0.015, 0.001, (DRAWS, n))),
    "30%, normal, deviation 5": (0.3, lambda n: RNG.normal(0.3, 0.05, (DRAWS, n))),
    "10%, beta, deviation 6.5": (0.1, lambda n: RNG.beta(2, 18, (DRAWS, n))),
    "90%, beta, deviation 6.5": (0.9, lambda n: RNG.beta(18, 2, (DRAWS, n))),
    "50%, uniform from 0 to 100": (0.5, lambda n: RNG.uniform(0, 1, (DRAWS, n))),
    "1.5% of 360 test images, binomial": (0.015, lambda n: RNG.binomial(360, 0.015, (DRAWS, n)) / 360),
    "11%: one run in ten fails at 90%": (
        0.108,
        lambda n: np.where(RNG.uniform(size=(DRAWS, n)) < 0.1, 0.9, RNG.normal(0.02, 0.002, (DRAWS, n))),
    ),
}
"""By name: the true mean, and a function that draws n errors, both as shares."""


def students(errors: Errors) -> tuple[Errors, Errors]:
    mean, half = _mean_and_half(errors)
    return mean - half, mean + half


def on_logits(errors: Errors) -> tuple[Errors, Errors]:
    mean, half = _mean_and_half(errors)
    slope = np.where(half > 0, mean * (1 - mean), 1)
    with np.errstate(divide="ignore"):
        return expit(logit(mean) - half / slope), expit(logit(mean) + half / slope)


def bootstrap(errors: Errors) -> tuple[Errors, Errors]:
    errors = errors[:BOOTSTRAPPED]
    count = errors.shape[1]
    chosen = RNG.integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(errors[:, chosen].mean(2), [2.5, 97.5], axis=1)
    return low, high


def _mean_and_half(errors: Errors) -> tuple[Errors, Errors]:
    count = errors.shape[1]
    return errors.mean(1), t.ppf(0.975, count - 1) * errors.std(1, ddof=1) / np.sqrt(count)


def main() -> None:
    methods = {"Student": students, "bootstrap": bootstrap, "shown": on_logits}
    print("| errors |", " | ".join(f"{name}, {n} seeds" for n in SEEDS for name in methods), "|")
    print("|---" + "|--:" * len(methods) * len(SEEDS) + "|")
    for name, (mean, draw) in DISTRIBUTIONS.items():
        cells = []
        for n in SEEDS:
            errors = draw(n)
            for method in methods.values():
                low, high = method(errors)
                cells.append(f"{100 * np.mean((low <= mean) & (mean <= high)):.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
