"""Aggregate the runs of a sweep: a cell for each condition and dataset, beside published error rates."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from feedbackhook.report.runs import Runs, describe
from feedbackhook.report.statistics import percent_interval
from feedbackhook.store import manifest
from feedbackhook.store.errors import StoreError
from feedbackhook.store.manifest import Manifest, ManifestRun, Published
from feedbackhook.store.run_folder import RunFolder

THRESHOLD = 3.0  # points of error from which a cell is better or worse than the reference
BETTER, ALIKE, WORSE = "better", "alike", "worse"


@dataclass(frozen=True)
class SweepTable:
    """Results of a sweep.

    Args:
        folder: the sweep's folder.
        manifest: what the sweep planned.
        runs: the planned runs that have ended.
        rows: the errors that they recorded, and the metrics of layers that were asked for, as
            :meth:`Runs.rows` returns them with categories.
        cells: a row for each condition and dataset, in the order of the sweep; errors in percent.
            `best_error` is the smallest test error over epochs and learning rates; `chosen_error` is the test
            error at the epoch and learning rate with the smallest validation error. Both are means over
            seeds; `..._low` and `..._high` are the ends of their 95% intervals (see
            :func:`feedbackhook.report.statistics.percent_interval`; missing with one seed). `lr_factor` is
            the learning-rate factor of the best run of the first seed, `best_epoch` its epoch. `runs` counts
            planned runs, `ended` those of them in the means, `diverged` those of these that diverged,
            `pruned` the planned runs that ended early since other learning rates were better, and `missing`
            the rest.
            `paper_error` is the published error, and `difference` is `best_error` minus that. `control` tells
            whether the condition is a control, `not_better` whether its `best_error` is not smaller than
            that of the best control on the dataset.
        missing: the runs that are in no mean, by name, and why; without those that were pruned.
        pruned: the runs that were pruned, by name; they are in no mean either.
        rank_correlation: by dataset, Spearman's correlation of our errors with the published ones over
            conditions, and the number of conditions; only for three or more.
    """

    folder: Path
    manifest: Manifest
    runs: Runs
    rows: pd.DataFrame
    cells: pd.DataFrame
    missing: dict[str, str]
    pruned: set[str]
    rank_correlation: dict[str, tuple[float, int]]

    @property
    def reference(self) -> str:
        """The condition with which the others are compared."""
        return self.manifest.reference

    def run_folder(self, run: ManifestRun) -> Path:
        """Return the folder of a planned run."""
        return self.folder / run.name


def sweep_table(folder: str | os.PathLike[str], of_layers: Iterable[str] = ()) -> SweepTable:
    """Aggregate the sweep in ``folder``, from its manifest and the tables of its runs.

    A run that has not ended, or has failed, is in no mean: it is named in `missing`, and its cell tells how
    many of its runs are in it.

    Args:
        folder: the sweep's folder.
        of_layers: metrics of single layers that `rows` should hold too.

    Raises:
        StoreError: the folder holds no sweep, or its manifest is missing or damaged.
    """
    folder = Path(folder)
    plan = manifest.read(folder)
    found = describe(path for run in plan.runs if (path := folder / run.name).is_dir())
    rows = found.rows(["test_error", "val_error", "train_error"], of_layers, categories=True)
    errors = run_errors(rows[rows["layer"].isna()])
    status = dict(found.runs[["run", "status"]].to_numpy())
    pruned = {name for name in found.skipped if _is_pruned(folder / name)}
    missing = _missing(folder, plan, found, set(errors.index) | pruned)
    place = [(run.name, run.dataset, run.condition, run.lr_factor, run.seed) for run in plan.runs]
    table = pd.DataFrame(place, columns=["run", "dataset", "condition", "lr_factor", "seed"])
    table = table.join(errors, on="run")
    table["status"] = table["run"].map(status).where(table["run"].isin(errors.index), "missing")
    table.loc[table["run"].isin(pruned), "status"] = "pruned"
    cells = _compared(pd.DataFrame(_cells(table, plan.published)), plan)
    return SweepTable(folder, plan, found, rows, cells, missing, pruned, dict(_rank_correlations(cells)))


def base_lr(runs: Iterable[ManifestRun]) -> str:
    """Return, in words, the learning rate that the factors multiply."""
    bases = dict.fromkeys(f"{run.lr / run.lr_factor:.6g}" for run in runs)
    return next(iter(bases)) if len(bases) == 1 else "that of each condition"


def run_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the errors of each run, a row for each.

    `best_error` is the smallest test error after training began, at `best_epoch`; `chosen_error` is the test
    error at the epoch with the smallest validation error, `val_error`. A run that diverged in its first epoch
    has the error of the untrained network.
    """
    by_epoch = rows.pivot_table("value", ["run", "epoch"], "metric", observed=True).reindex(
        columns=["test_error", "val_error"]
    )
    by_epoch = by_epoch[np.isfinite(by_epoch["test_error"])].reset_index("epoch")
    by_epoch.index = by_epoch.index.astype(object)
    began = (by_epoch["epoch"] > 0).groupby("run").transform("any")
    trained = by_epoch[(by_epoch["epoch"] > 0) | ~began].reset_index()
    best = trained.loc[trained.groupby("run")["test_error"].idxmin()].set_index("run")
    validated = trained.dropna(subset="val_error")
    chosen = validated.loc[validated.groupby("run")["val_error"].idxmin()].set_index("run")
    return pd.DataFrame(
        {
            "best_error": best["test_error"],
            "best_epoch": best["epoch"],
            "val_error": chosen["val_error"],
            "chosen_error": chosen["test_error"],
        },
        index=best.index,
    )


def _missing(folder: Path, plan: Manifest, found: Runs, with_errors: set[str]) -> dict[str, str]:
    """The runs that are in no mean, by name, and why."""
    have_ended = set(found.runs["run"])
    names = {run.name for run in plan.runs}
    missing = {
        name: found.skipped.get(name, "it has no test error" if name in have_ended else "not started")
        for name in (run.name for run in plan.runs)
        if name not in with_errors
    }
    left_over = [path.parent.name for path in sorted(folder.glob("*/status.json"))]
    return missing | {name: "not planned by this sweep" for name in left_over if name not in names}


def _is_pruned(folder: Path) -> bool:
    try:
        result = RunFolder(folder).result()
    except StoreError:
        return False  # damaged: it is among the missing
    return result is not None and result.status == "pruned"


def _cells(runs: pd.DataFrame, published: Published | None) -> Iterator[dict[str, Any]]:
    errors: Mapping[str, Mapping[str, float]] = {} if published is None else published.errors
    for (dataset, condition), part in runs.groupby(["dataset", "condition"], sort=False):
        ended = part[~part["status"].isin(["missing", "pruned"])]
        best = ended.loc[ended.groupby("seed")["best_error"].idxmin()]
        validated = ended.dropna(subset=["val_error"])
        chosen = validated.loc[validated.groupby("seed")["val_error"].idxmin()]
        yield {
            "dataset": dataset,
            "condition": condition,
            **_interval("best", best["best_error"]),
            **_interval("chosen", chosen["chosen_error"]),
            "seeds": len(best),
            "lr_factor": best["lr_factor"].iloc[0] if len(best) else np.nan,
            "best_epoch": best["best_epoch"].iloc[0] if len(best) else np.nan,
            "runs": len(part),
            "ended": len(ended),
            **{name: int((part["status"] == name).sum()) for name in ("diverged", "pruned", "missing")},
            "paper_error": errors.get(dataset, {}).get(condition, np.nan),
        }


def _interval(name: str, values: pd.Series) -> dict[str, float]:
    mean, low, high = percent_interval(values)
    return {f"{name}_error": mean, f"{name}_low": low, f"{name}_high": high}


def _compared(cells: pd.DataFrame, plan: Manifest) -> pd.DataFrame:
    """Add the difference from the published errors, and the class of both beside their reference."""
    ours = cells[cells["condition"] == plan.reference].set_index("dataset")["best_error"]
    published = plan.published
    theirs = (
        {}
        if published is None
        else {
            dataset: errors.get(published.reference, np.nan) for dataset, errors in published.errors.items()
        }
    )
    marked = mark_controls(cells, {name for name, given in plan.conditions.items() if given.control})
    return marked.assign(
        difference=cells["best_error"] - cells["paper_error"],
        class_of_best=_classes(cells["best_error"] - cells["dataset"].map(ours)),
        class_of_paper=_classes(cells["paper_error"] - cells["dataset"].map(theirs)),
    )


def mark_controls(cells: pd.DataFrame, controls: Collection[str]) -> pd.DataFrame:
    """Add `control` and `not_better`: see `SweepTable.cells`.

    Args:
        cells: with `dataset`, `condition` and `best_error`.
        controls: the conditions that are controls.
    """
    control = cells["condition"].isin(list(controls))
    least = cells[control].groupby("dataset")["best_error"].min()
    not_better = cells["best_error"] >= cells["dataset"].map(least).astype(float)
    return cells.assign(control=control, not_better=not_better & ~control)


def _classes(difference: pd.Series) -> pd.Series:
    rounded = difference.astype(float).round(6)  # 3 points are 3 points, whatever their last bit
    classes = np.select([rounded <= -THRESHOLD, rounded >= THRESHOLD], [BETTER, WORSE], ALIKE)
    return pd.Series(classes, difference.index).where(rounded.notna())


def _rank_correlations(cells: pd.DataFrame) -> Iterator[tuple[str, tuple[float, int]]]:
    for dataset, part in cells.groupby("dataset", sort=False):
        both = part[["best_error", "paper_error"]].dropna()
        if len(both) >= 3 and both.nunique().min() > 1:  # else nothing is ranked
            yield dataset, (both["best_error"].corr(both["paper_error"], method="spearman"), len(both))
