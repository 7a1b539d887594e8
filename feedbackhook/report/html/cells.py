"""The grid of a sweep's page: a color, a learning curve and links for each cell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from feedbackhook.report import theme
from feedbackhook.report.aggregate import SweepTable, run_errors

__all__ = ["SCALE", "bases", "cell_id", "grid", "runs_id", "shade"]

_MIDDLE, _BETTER, _WORSE = "#f4f4f4", "#56b4e9", "#e8833a"
_FAR = 30.0  # points from the reference; beyond, the color stays the same
_WIDTH, _HEIGHT = 100, 30  # of a curve, in units of its own
_POINTS = 60  # of a curve at most

SCALE = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
"""Points of error whose colors the page explains."""


def shade(difference: float) -> str:
    """Return the color of a cell whose error is this many points above the one that it is compared with.

    From blue (30 points better or more) through light gray to orange (30 points worse or more), linear in the
    logarithm of 1 + abs(difference). Black text is legible on all of them.
    """
    share = min(1.0, math.log1p(abs(difference)) / math.log1p(_FAR))
    return theme.mixed(_MIDDLE, _BETTER if difference < 0 else _WORSE, share)


def cell_id(row: int, column: int) -> str:
    """Return the id of a cell of the grid."""
    return f"cell-{row}-{column}"


def runs_id(row: int, column: int) -> str:
    """Return the id of the runs of a cell."""
    return f"runs-{row}-{column}"


def bases(table: SweepTable) -> tuple[dict[str, float], str]:
    """Return the error of each dataset with which its cells are compared, and in words what it is.

    It is that of the reference, if the reference has an error wherever another condition has one, and else
    the smallest error of the dataset.
    """
    known = table.cells.dropna(subset="best_error").set_index("dataset")
    reference = known.loc[known["condition"] == table.reference, "best_error"]
    if set(reference.index) == set(known.index):
        return reference.to_dict(), table.reference
    return known.groupby("dataset")["best_error"].min().to_dict(), "the smallest error of each dataset"


def grid(table: SweepTable) -> list[dict[str, Any]]:
    """Return a row for each condition, with `condition` and `cells`, in the order of the datasets.

    A cell has the columns of `table.cells` (None is a missing value), ids, `color`, and the points of its
    `curve` and of the reference's in the same dataset; None where there is nothing to draw.
    """
    cells = table.cells.astype(object).where(table.cells.notna(), None)
    by_place = {(cell["condition"], cell["dataset"]): cell for cell in cells.to_dict("records")}
    conditions, datasets = list(cells["condition"].unique()), list(cells["dataset"].unique())
    curves, (base, _) = _curves(table), bases(table)
    ranges = {dataset: _range(curves, dataset) for dataset in datasets}
    rows = []
    for row, condition in enumerate(conditions):
        placed = []
        for column, dataset in enumerate(datasets):
            cell = by_place[condition, dataset]
            error = cell["best_error"]
            own = {
                "id": cell_id(row, column),
                "runs_id": runs_id(row, column),
                "color": None if error is None else shade(error - base[dataset]),
                "curve_range": ranges[dataset],
                **_drawn(curves, dataset, condition, table.reference, ranges[dataset]),
            }
            placed.append(cell | own)
        rows.append({"condition": condition, "cells": placed})
    return rows


def _curves(table: SweepTable) -> dict[tuple[str, str], pd.Series]:
    """The test error by epoch of each dataset and condition: the mean over seeds of their best runs."""
    rows = table.rows[table.rows["layer"].isna()]
    planned = pd.DataFrame(
        [(run.name, run.dataset, run.condition, run.seed) for run in table.manifest.runs],
        columns=["run", "dataset", "condition", "seed"],
    )
    planned = planned.join(run_errors(rows)["best_error"], on="run").dropna(subset="best_error")
    best = planned.loc[planned.groupby(["dataset", "condition", "seed"])["best_error"].idxmin()]
    errors = rows[(rows["metric"] == "test_error") & np.isfinite(rows["value"])]
    errors = errors.assign(run=errors["run"].astype(str))
    joined = best.merge(errors[["run", "epoch", "value"]], on="run")
    means = joined.groupby(["dataset", "condition", "epoch"])["value"].mean().reset_index()
    return {
        (str(dataset), str(condition)): part.set_index("epoch")["value"]
        for (dataset, condition), part in means.groupby(["dataset", "condition"], sort=False)
    }


def _range(curves: dict[tuple[str, str], pd.Series], dataset: str) -> tuple[float, float] | None:
    """The smallest and the largest error of the curves of a dataset; below any zero, half the smallest."""
    values = [curve.to_numpy() for (of, _), curve in curves.items() if of == dataset]
    errors = np.concatenate(values) if values else np.empty(0)
    positive = errors[errors > 0]
    if not len(positive):
        return None
    low = float(positive.min())
    return (low / 2 if (errors <= 0).any() else low), float(positive.max())


def _drawn(
    curves: dict[tuple[str, str], pd.Series],
    dataset: str,
    condition: str,
    reference: str,
    limits: tuple[float, float] | None,
) -> dict[str, Any]:
    curve = curves.get((dataset, condition))
    if curve is None or len(curve) < 2 or limits is None:
        return {"curve": None, "reference_curve": None, "curve_words": None}
    last = max(int(each.index.max()) for (of, _), each in curves.items() if of == dataset)
    other = curves.get((dataset, reference)) if condition != reference else None
    return {
        "curve": _points(curve, limits, last),
        "reference_curve": None if other is None else _points(other, limits, last),
        "curve_words": (
            f"Test error from {curve.iloc[0]:.2f}% in epoch {curve.index[0]} "
            f"to {curve.iloc[-1]:.2f}% in epoch {curve.index[-1]}"
        ),
    }


def _points(curve: pd.Series, limits: tuple[float, float], last: int) -> str:
    """The points of a line in an SVG picture, with a logarithmic vertical axis."""
    kept = curve.iloc[_spread(len(curve))]
    low, high = np.log(limits)
    height = np.log(np.maximum(kept.to_numpy(float), limits[0])) - low
    y = _HEIGHT * (1 - (height / (high - low) if high > low else height + 0.5))
    x = _WIDTH * kept.index.to_numpy() / max(last, 1)
    return " ".join(f"{across:.4g},{down:.4g}" for across, down in zip(x, y, strict=True))


def _spread(count: int) -> NDArray[np.int64]:
    """At most `_POINTS` places of so many, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))
