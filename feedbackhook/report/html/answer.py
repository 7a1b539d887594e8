"""The answer of a sweep, at the top of its page: which rule comes closest to backprop, and how close."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from feedbackhook.report.aggregate import SweepTable

__all__ = ["Answer", "answer"]

_EXACT = (None, "symmetric")  # rules that give backprop's gradients

_KINDS = {
    "chosen_error": "Errors are those on the test set at the epoch and learning rate with the smallest "
    "validation error.",
    "best_error": "Errors are the smallest on the test set over epochs and learning rates, so all are a "
    "little too small.",
}


@dataclass(frozen=True)
class Answer:
    """The best condition with another rule than backprop, beside the best one with backprop.

    Args:
        sentences: the answer in words, or why there is none.
        best: the condition with the rule.
        backprop: the condition with backprop.
        difference: the error of the first minus that of the second, in points, as a mean over datasets.
        by_dataset: for each dataset, `best` and `backprop` with their `error` and `backprop_error`.
    """

    sentences: list[str]
    best: str | None = None
    backprop: str | None = None
    difference: float | None = None
    by_dataset: list[dict[str, Any]] = field(default_factory=list)


def answer(table: SweepTable) -> Answer:
    """Answer from the errors chosen on validation data where all cells have them, else from the best ones.

    Controls, whose body does not learn, count neither as a rule nor as backprop.
    """
    conditions = table.manifest.conditions
    rules = {name: condition.rule for name, condition in conditions.items() if not condition.control}
    exact = [name for name, rule in rules.items() if rule in _EXACT]
    others = [name for name in rules if name not in exact]
    if not exact or not others:
        missing = "backprop" if others else "a rule beside backprop"
        return Answer([f"No answer: the sweep has no condition with {missing}."])
    validated = table.cells["best_error"].notna() & table.cells["chosen_error"].isna()
    kind = "best_error" if validated.any() or table.cells["chosen_error"].isna().all() else "chosen_error"
    errors = table.cells.pivot(index="condition", columns="dataset", values=kind).astype(float)
    errors = errors.reindex(index=list(rules), columns=list(table.manifest.datasets))
    datasets = [name for name in errors if errors.loc[exact, name].any() and errors.loc[others, name].any()]
    complete = errors[datasets].dropna()
    means = complete.mean(axis=1)
    ours, theirs = (means.reindex(names).dropna() for names in (others, exact))
    if not datasets or ours.empty or theirs.empty:
        why = "with a rule, or none with backprop, has runs that have ended on every dataset"
        return Answer([f"No answer yet: no condition {why}."])
    best, backprop = str(ours.idxmin()), str(theirs.idxmin())
    over = "" if len(datasets) == 1 else f", as a mean over {len(datasets)} datasets"
    sentences = [
        f"{_among(len(ours), 'with another rule than backprop')} {best} has the smallest test error, "
        f"{ours[best]:.2f}%{over}. {_among(len(theirs), 'with backprop')} {backprop} has the smallest, "
        f"{theirs[backprop]:.2f}%.",
        *_cautions(table, kind, rules, complete),
    ]
    by_dataset = [_of_dataset(errors[name], name, others, exact) for name in datasets]
    return Answer(sentences, best, backprop, float(ours[best] - theirs[backprop]), by_dataset)


def _among(count: int, which: str) -> str:
    return f"Of {count} conditions {which}," if count > 1 else f"Of the conditions {which}, the only one,"


def _of_dataset(errors: pd.Series, dataset: str, others: list[str], exact: list[str]) -> dict[str, Any]:
    best, backprop = (errors.reindex(names).idxmin() for names in (others, exact))
    return {
        "dataset": dataset,
        "best": best,
        "error": errors[best],
        "backprop": backprop,
        "backprop_error": errors[backprop],
    }


def _cautions(table: SweepTable, kind: str, rules: dict[str, Any], complete: pd.DataFrame) -> list[str]:
    found = [_KINDS[kind]]
    seeds = table.manifest.seeds
    found.append(
        "There is one seed, so small differences may be chance."
        if seeds == 1
        else f"They are means over {seeds} seeds; intervals and tests are below."
    )
    if left := [name for name in rules if name not in complete.index]:
        found.append(f"Without an error on every dataset, and so not compared: {', '.join(left)}.")
    return found
