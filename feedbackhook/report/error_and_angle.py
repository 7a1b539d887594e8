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
    and `angle` (degrees): the mean over all layers but the last, whose gradient involves no feedback weights,
    of the mean gradient angle over the recorded steps. It is missing if a layer has no angle in more than
    half of these steps, since its gradient is zero or the layer is frozen.
    """
    rows = runs.rows(of_layers=["gradient_angle"], categories=True).astype({"run": object})
    hidden = rows[rows["depth"] < rows.groupby("run")["depth"].transform("max")]
    of_layer = hidden.groupby(["run", "depth"])["value"]
    angles = of_layer.mean().where(2 * of_layer.count() >= of_layer.size())
    angle = angles.groupby("run").agg(lambda of_run: of_run.mean(skipna=False))
    finished = runs.runs[runs.runs["status"] == "finished"].set_index("run")
    made = finished.rename(columns={"last_error": "error"}).join(angle.rename("angle"), how="inner")
    columns = ["run", "dataset", "condition", "rule", "learning_rate", "error", "angle"]
    return made.reset_index()[columns]


def rank_correlations(made: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of angle and error over the runs of each dataset.

    Args:
        made: what :func:`points` returns.

    Returns:
        A row for each dataset: `dataset`, `runs`, those of them `with_angle`, and `correlation`, which is
        missing for fewer than three runs with an angle.
    """
    found = []
    for dataset, part in made.groupby("dataset", sort=False):
        drawn = part.dropna(subset="angle")
        value = drawn["angle"].corr(drawn["error"], method="spearman") if len(drawn) > 2 else math.nan
        found.append({"dataset": dataset, "runs": len(part), "with_angle": len(drawn), "correlation": value})
    return pd.DataFrame(found)


def draw(made: pd.DataFrame) -> Figure:
    """Draw error against angle: a point for each run with an angle, colored by rule; a panel by dataset.

    Args:
        made: what :func:`points` returns.

    Raises:
        NothingToDraw: there is no point.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    counts = rank_correlations(made)
    recorded, made = len(made), made.dropna(subset="angle")
    if not recorded:
        raise NothingToDraw("no finished run has a gradient angle: set record.gradient_angle_every")
    if made.empty:
        raise NothingToDraw(
            "no finished run has a gradient angle in half of the recorded steps of each layer"
        )
    counts = counts[counts["with_angle"] > 0].set_index("dataset")
    count = len(counts)
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
            of_dataset = counts.loc[dataset]
            drawn, runs = int(of_dataset["with_angle"]), int(of_dataset["runs"])
            number = f"{runs} runs" if drawn == runs else f"{drawn} of {runs} runs"
            value = of_dataset["correlation"]
            rank = [] if math.isnan(value) else [f"rank correlation {value:.2f}"]
            axes.set_title("\n".join([_short(str(dataset)), *rank, number]), fontsize="medium")
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
