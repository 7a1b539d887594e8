"""Configurations beside one another: their errors over seeds, and paired tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from feedbackhook.experiments.config import ConfigError
from feedbackhook.report.runs import Runs
from feedbackhook.report.statistics import LEAST_PAIRS, LEVEL, PairedTest, paired_test, percent_interval

ERRORS = {"final": "last_error", "best": "best_error"}

_BLOCK = ["dataset", "seed"]  # what the two runs of a pair share
_DECIDED = ["rule", "options", "batch_norm", "frozen", "optimizer", "setting"]  # by a condition
_OTHERS = ["learning_rate", "model", "held_out", "epochs", "batch_size", "batch_sizes"]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Args:
        means: a row a configuration and dataset: `configuration`, `dataset`, `runs`, `diverged`, and of the
            final and of the best test error in percent `..._mean`, `..._low` and `..._high`, the ends of the
            95% interval over seeds (missing with one).
        tests: a row two configurations and kind of error: `first`, `second`, `error`, the fields of
            :class:`feedbackhook.report.statistics.PairedTest`, and `verdict`, the test in words. Pairs are
            runs on the same dataset with the same seed.
    """

    means: pd.DataFrame
    tests: pd.DataFrame


def compare(runs: Runs) -> Comparison:
    """Compare the runs, those of equal configuration but for dataset and seed taken together.

    Raises:
        ConfigError: no run has ended, one has diverged before there was an error, or two are of the same
            configuration, dataset and seed.
    """
    table = runs.runs
    if table.empty:
        raise ConfigError(f"no run has ended: {'; '.join(f'{n}: {why}' for n, why in runs.skipped.items())}")
    if len(without := table[table[list(ERRORS.values())].isna().any(axis=1)]):
        raise ConfigError(
            f"{without['run'].iloc[0]} has no test error ({without['reason'].iloc[0]}): leave it out"
        )
    table = table.assign(configuration=_labels(table))
    for _, same in table.groupby(["configuration", *_BLOCK]):
        if len(same) > 1:
            names = " and ".join(same["run"])
            raise ConfigError(f"{names} are of one configuration and seed: leave one of them out")
    return Comparison(pd.DataFrame(_means(table)), pd.DataFrame(_tests(table), columns=_TEST_COLUMNS))


def _labels(table: pd.DataFrame) -> list[str]:
    """What tells each configuration from the others, in words."""
    by_condition = bool(table["condition"].notna().all())
    columns = _OTHERS if by_condition else [*_DECIDED[1:], *_OTHERS]
    varying = [name for name in columns if table[name].map(str).nunique() > 1]
    shown = ["condition" if by_condition else "rule", *varying]
    return [", ".join(_words(name, row[name]) for name in shown) for row in table.to_dict("records")]


def _words(name: str, value: Any) -> str:
    if name in ("condition", "rule", "model"):
        return "backprop" if name == "rule" and pd.isna(value) else str(value)
    return (
        f"{name.replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
    )


def _means(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for (configuration, dataset), part in table.groupby(["configuration", "dataset"], sort=False):
        row = {"configuration": configuration, "dataset": dataset, "runs": len(part)}
        row["diverged"] = int((part["status"] == "diverged").sum())
        for kind, column in ERRORS.items():
            found = percent_interval(part[column])._asdict()
            row |= {f"{kind}_{name}": value for name, value in found.items()}
        yield row


_TEST_COLUMNS = ["first", "second", "error", *PairedTest._fields, "verdict"]


def _tests(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for first, second in itertools.combinations(table["configuration"].unique(), 2):
        sides = (table[table["configuration"] == label].set_index(_BLOCK) for label in (first, second))
        pairs = pd.concat(dict(zip(("first", "second"), sides, strict=True)), axis=1, join="inner")
        for kind, column in ERRORS.items():
            test = paired_test(pairs["first"][column], pairs["second"][column])
            verdict = _verdict(test, first, second)
            yield {"first": first, "second": second, "error": kind, **test._asdict(), "verdict": verdict}


def _verdict(test: PairedTest, first: str, second: str) -> str:
    if test.pairs == 0:
        return "nothing to compare: no two runs share dataset and seed"
    if test.p is None:
        return f"too few runs to tell: pairs that differ: {test.differing}, and it takes {LEAST_PAIRS}"
    if test.p >= LEVEL:
        return f"no difference shown (p = {test.p:.2g})"
    smaller, larger = (first, second) if (test.effect or 0) < 0 else (second, first)
    return f"{smaller} errs less than {larger} (p = {test.p:.2g})"
