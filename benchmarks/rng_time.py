"""How long random numbers take: those of one layer of 2.4 million weights, on one thread.

Whole draws take turns, in a new random order each round; the table has the median and the quartiles of their
times, and those of another version in the same process if its checkout is given.

    python benchmarks/rng_time.py
    python benchmarks/rng_time.py --before ../checkout-of-an-earlier-commit

Rewrites benchmarks/results/rng_time.csv.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from common import RESULTS, another_version, timed

import feedbackhook

NUMBERS = 2_400_000


def main() -> None:
    """Time the draws, and write and print the table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds that count")
    parser.add_argument("--before", type=Path, help="a checkout whose draws take turns")
    parser.add_argument("--output", type=Path, default=RESULTS / "rng_time.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"now": feedbackhook}
    if given.before is not None:
        versions["before"] = another_version(given.before)
    draws = {
        (version, method, fused): draw
        for version, package in versions.items()
        for (method, fused), draw in _draws(package).items()
    }
    times: dict[tuple[str, str, bool], list[float]] = {name: [] for name in draws}
    order = random.Random(0)
    for number in range(3 + given.rounds):
        for name in order.sample(list(draws), len(draws)):
            milliseconds = timed(draws[name], torch.device("cpu"))
            if number >= 3:
                times[name].append(milliseconds)
    rows = [
        (*name, NUMBERS, *np.percentile(values, [50, 25, 75]).round(3), torch.__version__)
        for name, values in times.items()
    ]
    columns = ["version", "method", "fused", "numbers", "median_ms", "q25_ms", "q75_ms", "torch"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(given.output, index=False)
    print(table.to_string(index=False))


def _draws(package: ModuleType) -> dict[tuple[str, bool], Callable[[], object]]:
    """Return what draws once, by method and whether it is fused."""
    layer, weight = package.LayerInfo("fc", "Linear", (NUMBERS, 1), NUMBERS), torch.empty(NUMBERS)
    methods = [name for name in ("uniform", "uniform16") if hasattr(package.CounterRNG, name)]
    return {
        (method, fused): partial(getattr(package.CounterRNG(0, layer, 3, fused), method), weight)
        for method in methods
        for fused in (False, True)
    }


if __name__ == "__main__":
    main()
