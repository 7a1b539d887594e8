"""Compare configurations: their errors over seeds, and paired tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from feedbackhook.names import nearest
from feedbackhook.report.aggregate import run_errors
from feedbackhook.report.errors import ReportError
from feedbackhook.report.runs import Runs
from feedbackhook.report.statistics import LEVEL, PairedTest, holm, paired_test, percent_interval
from feedbackhook.store import manifest

ERRORS = {"final": "last_error", "best": "best_error"}

_BLOCK = ["dataset", "seed"]  # what the two runs of a pair share
_SET_BY_CONDITION = ["rule", "options", "batch_norm", "frozen", "optimizer", "setting"]
_OTHERS = ["model", "val_fraction", "epochs", "batch_size", "batch_sizes"]
_RATE = "learning_rate"


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Args:
        means: a row for each configuration and dataset: `configuration`, `dataset`, `learning_rate`, `rates`
            (the number of learning rates to choose from), `runs`, `diverged`, and for the final and the best
            test error in percent `..._mean`, `..._low` and `..._high`, the ends of the 95% interval over
            seeds (missing with one seed).
        tests: a row for each two configurations and kind of error: `first`, `second`, `error`, the fields of
            :class:`feedbackhook.report.statistics.PairedTest`, `corrected`, which is p corrected by Holm's
            method for the number of pairs of configurations that have a p, and `verdict`, the result in
            words. A pair of runs is on the same dataset with the same seed.
        chosen_by: how learning rates were chosen, in words; empty if there was nothing to choose.
    """

    means: pd.DataFrame
    tests: pd.DataFrame
    chosen_by: str


def compare(runs: Runs, against: str | None = None, rates: bool = False) -> Comparison:
    """Compare runs. Runs that differ only in dataset, learning rate and seed are one configuration.

    For each configuration and dataset, one learning rate counts: the one with the smallest validation error
    (smallest over epochs, mean over seeds). If a run has no validation error, it is the one with the smallest
    best test error instead.

    Args:
        runs: the runs.
        against: the configuration to test each of the others against, or `all` to test every pair; None: the
            first one, in the order of the sweep's conditions.
        rates: treat the learning rate as part of the configuration, instead of choosing one.

    Raises:
        ReportError: no run has ended, a run diverged before it had an error, two runs have the same
            configuration, dataset and seed, or no configuration has the name ``against``.
    """
    table = runs.runs
    if table.empty:
        raise ReportError(f"no run has ended: {'; '.join(f'{n}: {why}' for n, why in runs.skipped.items())}")
    if len(without := table[table[list(ERRORS.values())].isna().any(axis=1)]):
        raise ReportError(
            f"{without['run'].iloc[0]} has no test error ({without['reason'].iloc[0]}): leave it out"
        )
    table = _in_order(table)
    table = table.assign(configuration=_labels(table, rates))
    for _, same in table.groupby(["configuration", _RATE, *_BLOCK]):
        if len(same) > 1:
            names = " and ".join(same["run"])
            raise ReportError(f"{names} have the same configuration and seed: leave one of them out")
    table, chosen_by = _at_chosen_rates(table, runs)
    tests = pd.DataFrame(_corrected(_tests(table, against)), columns=_TEST_COLUMNS)
    return Comparison(pd.DataFrame(_means(table)), tests, chosen_by)


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort the runs of each sweep by the order of its conditions, and keep the order of the sweeps."""
    sweeps: dict[Path, dict[str, int]] = {}
    places = []
    for folder, condition in table[["folder", "condition"]].to_numpy():
        sweep = Path(folder).parent
        if sweep not in sweeps:
            names = list(manifest.read(sweep).conditions) if manifest.exists(sweep) else []
            sweeps[sweep] = {name: place for place, name in enumerate(names)}
        places.append((list(sweeps).index(sweep), sweeps[sweep].get(condition, len(sweeps[sweep]))))
    order = sorted(range(len(places)), key=places.__getitem__)  # a stable sort
    return table.iloc[order].reset_index(drop=True)


def _at_chosen_rates(table: pd.DataFrame, runs: Runs) -> tuple[pd.DataFrame, str]:
    """The runs at the learning rate chosen for each configuration and dataset, with the number of `rates` to
    choose from, and how it was chosen, in words."""
    cell = ["configuration", "dataset"]
    table = table.assign(rates=table.groupby(cell)[_RATE].transform("nunique"))
    several = table[table["rates"] > 1]
    if several.empty:
        return table, ""
    if (several["val_fraction"] > 0).all():
        rows = Runs(several, runs.skipped).rows(["test_error", "val_error"])
        score = several["run"].map(run_errors(rows)["val_error"])
        several = several[score.notna()]  # an unreadable table is in `skipped` now
        chosen_by = "validation error"
    else:
        score, chosen_by = (
            several["best_error"],
            "best test error, which is too optimistic: there is no validation set",
        )
    by_rate = several.assign(score=score).groupby([*cell, _RATE], sort=False)
    rates = by_rate["score"].agg(["count", "mean"]).reset_index()
    rates = rates.sort_values(["count", "mean"], ascending=[False, True], kind="stable")  # seeds first
    chosen = rates.drop_duplicates(cell)[[*cell, _RATE]]
    kept = several.merge(chosen, on=[*cell, _RATE])
    single = table[table["rates"] == 1]
    names = list(dict.fromkeys(table["configuration"]))
    both = pd.concat([part for part in (single, kept) if len(part)])
    return both.sort_values("configuration", key=lambda c: c.map(names.index), kind="stable"), chosen_by


def _labels(table: pd.DataFrame, rates: bool) -> list[str]:
    """The name of each run's configuration: what differs between configurations on the same dataset."""
    by_condition = bool(table["condition"].notna().all())
    columns = [*([] if by_condition else _SET_BY_CONDITION[1:]), *([_RATE] if rates else []), *_OTHERS]
    texts = table[["dataset", *columns]].astype(str)
    varying = [name for name in columns if texts.groupby("dataset")[name].nunique().max() > 1]
    shown = ["condition" if by_condition else "rule", *varying]
    return [
        ", ".join(filter(None, (_words(name, row[name]) for name in shown)))
        for row in table.to_dict("records")
    ]


def _words(name: str, value: Any) -> str:
    """A setting in words; empty if there is none."""
    if isinstance(value, dict) and name == "options":
        return ", ".join(f"{option} {setting}" for option, setting in value.items())
    if value == {} or (name == "frozen" and pd.isna(value)):
        return ""
    if name in ("condition", "rule", "model"):
        return "backprop" if name == "rule" and pd.isna(value) else str(value)
    return (
        f"{name.replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
    )


def _means(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for (configuration, dataset), part in table.groupby(["configuration", "dataset"], sort=False):
        row = {"configuration": configuration, "dataset": dataset}
        row |= {"learning_rate": part[_RATE].iloc[0], "rates": part["rates"].iloc[0], "runs": len(part)}
        row["diverged"] = int((part["status"] == "diverged").sum())
        for kind, column in ERRORS.items():
            found = percent_interval(part[column])._asdict()
            row |= {f"{kind}_{name}": value for name, value in found.items()}
        yield row


_TEST_COLUMNS = ["first", "second", "error", *PairedTest._fields, "corrected", "verdict"]


def _corrected(tests: Iterable[tuple[str, str, str, PairedTest]]) -> Iterator[dict[str, Any]]:
    """The rows of the tests: each kind of error is a family of its own."""
    tests = list(tests)
    known = {kind: [t.p for *_, of, t in tests if of == kind and t.p is not None] for kind in ERRORS}
    corrected = {kind: iter(holm(p_values)) for kind, p_values in known.items()}
    for first, second, kind, test in tests:
        p = None if test.p is None else next(corrected[kind])
        row = {"first": first, "second": second, "error": kind, **test._asdict(), "corrected": p}
        yield row | {"verdict": _verdict(test, p, len(known[kind]), first, second)}


def _tests(table: pd.DataFrame, against: str | None) -> Iterator[tuple[str, str, str, PairedTest]]:
    for first, second in _pairs(list(table["configuration"].unique()), against):
        sides = (table[table["configuration"] == label].set_index(_BLOCK) for label in (first, second))
        pairs = pd.concat(dict(zip(("first", "second"), sides, strict=True)), axis=1, join="inner")
        for kind, column in ERRORS.items():
            yield first, second, kind, paired_test(pairs["first"][column], pairs["second"][column])


def _pairs(names: list[str], against: str | None) -> list[tuple[str, str]]:
    """Each configuration with the one to test it against."""
    if against == "all":
        return [(first, second) for second, first in itertools.combinations(names, 2)]
    reference = names[0] if against is None else against
    if reference not in names:
        raise ReportError(f"against {against!r}: no configuration has this name{nearest(reference, names)}")
    return [(name, reference) for name in names if name != reference]


def _verdict(test: PairedTest, p: float | None, tests: int, first: str, second: str) -> str:
    if test.pairs == 0:
        return "nothing to compare: no two runs share a dataset and a seed"
    if p is None:
        return "too few runs"
    found = f"{'p' if tests == 1 else 'corrected p'} = {p:.2g}"
    if p >= LEVEL:
        return f"no difference shown ({found})"
    smaller, larger = (first, second) if (test.effect or 0) < 0 else (second, first)
    return f"{smaller} has a lower error than {larger} ({found})"
