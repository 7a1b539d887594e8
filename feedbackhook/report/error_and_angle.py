"""Draw the final error of runs against how well their gradients agreed with backprop's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from feedbackhook.report import theme
from feedbackhook.report.errors import NothingToDraw
from feedbackhook.report.runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "error_and_angle"


def points(runs: Runs) -> pd.DataFrame:
    """Return a row for each finished run that recorded gradient angles.

    Columns: `run`, `dataset`, `condition`, `rule`, `learning_rate`, `error` (the last test error, percent)
    and `angle` (degrees), the mean gradient angle over the recorded steps and over all layers but the last,
    whose gradient involves no feedback weights.
    """
    rows = runs.rows(of_layers=["gradient_angle"], categories=True)
    rows = rows[rows["value"].notna()].astype({"run": object})
    last = rows.groupby("run")["depth"].transform("max")
    angle = rows[rows["depth"] < last].groupby("run")["value"].mean()
    finished = runs.runs[runs.runs["status"] == "finished"].set_index("run")
    made = finished.rename(columns={"last_error": "error"}).join(angle.rename("angle"), how="inner")
    columns = ["run", "dataset", "condition", "rule", "learning_rate", "error", "angle"]
    return made.reset_index()[columns]


def rank_correlations(made: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of angle and error over the runs of each dataset.

    Args:
        made: what :func:`points` returns.

    Returns:
        A row for each dataset: `dataset`, `runs` and `correlation`, which is missing for fewer than three
        runs.
    """
    return pd.DataFrame(
        {
            "dataset": dataset,
            "runs": len(part),
            "correlation": part["angle"].corr(part["error"], method="spearman")
            if len(part) > 2
            else math.nan,
        }
        for dataset, part in made.groupby("dataset", sort=False)
    )


def draw(made: pd.DataFrame) -> Figure:
    """Draw error against angle: a point for each run, colored by rule, and a panel for each dataset.

    Args:
        made: what :func:`points` returns.

    Raises:
        NothingToDraw: there is no point.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if made.empty:
        raise NothingToDraw("no finished run has a gradient angle: set record.gradient_angle_every")
    correlations = rank_correlations(made).set_index("dataset")
    count = len(correlations)
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = math.ceil(count / columns)
    with theme.style():
        figure = Figure(
            figsize=theme.figsize(max(5.0, 3.2 * columns), 0.6 + 3.0 * rows), layout="constrained"
        )
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[count:]:
            axes.remove()
        handles = {}
        for axes, (dataset, part) in zip(panels, made.groupby("dataset", sort=False), strict=False):
            for rule, of_rule in part.groupby("rule", sort=False):
                look = theme.look(str(rule))
                handles[rule] = axes.scatter(
                    of_rule["angle"], of_rule["error"], color=look.color, marker=look.marker, label=rule, s=30
                )
            value = correlations.loc[dataset, "correlation"]
            rank = "" if math.isnan(value) else f"\nrank correlation {value:.2f}, {len(part)} runs"
            axes.set_title(f"{_short(str(dataset))}{rank}", fontsize="medium")
            axes.set(xlabel="mean gradient angle [°]", ylabel="last test error [%]")
            axes.set_xlim(0, max(95.0, 1.05 * part["angle"].max()))
            axes.set_xticks(range(0, 91, 30))
            if (part["error"] > 0).all():  # a logarithmic axis has no 0
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                narrow = part["error"].max() < 4 * part["error"].min()
                axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if narrow else (1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.axvline(90, linestyle=":", color=theme.ink())
        order = [*theme.RULES, *handles]
        rules = sorted(handles, key=order.index)
        figure.legend(
            [handles[rule] for rule in rules], rules, loc="outside right upper", title="rule", frameon=False
        )
    return figure


def write(runs: Runs, folder: Path, formats: Sequence[str] = ("png",), dpi: int = 150) -> list[Path]:
    """Draw these runs, and return the files written.

    Raises:
        NothingToDraw: no finished run has a gradient angle.
    """
    figure = draw(points(runs))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{NAME}.{suffix}" for suffix in formats]
    for file in files:
        figure.savefig(file, dpi=dpi)
    return files


def _short(dataset: str) -> str:
    return dataset.rstrip("/").replace(":", "/").rpartition("/")[2]
