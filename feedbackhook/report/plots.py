"""Draw figures from the tidy table (see feedbackhook.store.recorder).

Each function returns a new matplotlib Figure, without pyplot's global state, so it works with and without a
display. Values that are not finite are left out; the figure says how many.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedbackhook.report import rules, theme
from feedbackhook.report.checks import draw_checks
from feedbackhook.report.errors import NothingToDraw
from feedbackhook.report.statistics import percent_interval
from feedbackhook.store.recorder import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = [
    "FIGURES",
    "accuracy_and_angle",
    "draw_all",
    "draw_run",
    "error_against_epoch",
    "layer_heat_map",
    "layers_against_epoch",
]

_SIZE = (7.0, 4.2)  # inches in a README; the theme scales it
_NAMED_LAYERS = 12  # number of layers up to which a legend of names can be read
_CELLS = 120  # number of columns of a heat map that can be told apart

QUANTITIES: dict[str, tuple[str, str]] = {
    "weight_angle": ("Weight angle", "angle between V and W [°]"),
    "error_angle": ("Error angle", "angle between error signals of V and W [°]"),
    "gradient_angle": ("Gradient angle", "angle to backprop's gradient [°]"),
    "norm_ratio": ("Norm ratio", "norm of V / norm of W"),
    "sign_agreement": ("Sign agreement", "share of agreeing signs"),
}
"""Title and axis label, with unit, of each metric that is drawn for each layer."""


def error_against_epoch(table: DataFrame) -> Figure:
    """Draw error in percent against epoch: a line for each run, test (solid) and training (dashed).

    Raises:
        ValueError: the table holds no error.
    """
    rows, left_out = _rows(table, {"test_error": "test", "train_error": "training"})
    runs = list(rows["run"].unique())
    with _figure(left_out) as (figure, axes, sns):
        # ten colors that color-blind readers can tell apart; more runs get an ordered scale
        palette = sns.color_palette("colorblind", len(runs)) if len(runs) <= 10 else theme.sequence(len(runs))
        by_run = {"hue": "run", "hue_order": runs, "palette": palette}
        sns.lineplot(
            rows.rename(columns={"metric": "error"}),
            x="epoch",
            y="value",
            style="error",
            style_order=["test", "training"],
            errorbar=None,
            **(by_run if len(runs) > 1 else {"color": palette[0]}),
            ax=axes,
        )
        axes.set(xlabel="epoch", ylabel="error [%]", title="Error against epoch")
        axes.set_ylim(bottom=0)
        _legend_beside(axes)
    return figure


def layers_against_epoch(table: DataFrame, metric: str) -> Figure:
    """Draw a metric of `QUANTITIES` against epoch: a line for each layer, colored by its depth.

    The x axis is the step if the table does not tell when epochs end. Dotted lines are references: 90 degrees
    for angles (unrelated directions), and for the weight angle also the angle that the rule implies at the
    start, as a mean over layers; 1 for ratios of norms; one half for agreeing signs. Several runs are drawn
    as their mean in a band of one standard deviation.

    Raises:
        ValueError: the table holds no such metric.
    """
    rows, left_out = _rows(_layers(table), {metric: metric})
    rows, clock = _timed(table, rows)
    title, label = QUANTITIES[metric]
    layers = rows.sort_values("depth")["layer"].unique().tolist()
    named = len(layers) <= _NAMED_LAYERS
    with _figure(left_out) as (figure, axes, sns):
        palette = theme.sequence(len(layers))
        sns.lineplot(
            rows,
            x=clock,
            y="value",
            hue="layer",
            hue_order=layers,
            palette=palette,
            errorbar="sd",
            legend=named,
            marker="o" if rows[clock].nunique() == 1 else None,  # a line through one point is not seen
            ax=axes,
        )
        axes.set(xlabel=clock, ylabel=label, title=f"{title} against {clock}")
        for value, meaning in _references(table, metric):
            axes.axhline(value, linestyle=":", color=theme.ink())
            axes.annotate(
                meaning,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 3),
                textcoords="offset points",
                ha="right",
                fontsize="x-small",
                color=theme.ink(),
                bbox={
                    "boxstyle": "square,pad=0.1",
                    "facecolor": axes.get_facecolor(),
                    "edgecolor": "none",
                    "alpha": 0.8,
                },
                zorder=10,
            )
        _scale(axes, metric, float(rows["value"].max()))
        if named:
            _legend_beside(axes, "layer, input to output")
        else:
            _depth_bar(figure, axes, palette, int(rows["depth"].min()))
    return figure


def layer_heat_map(table: DataFrame, metric: str = "error_angle") -> Figure:
    """Draw a metric of `QUANTITIES` as color: a row for each layer, input at the top, a column for each step.

    Several runs are shown as their mean; many steps are thinned out evenly.

    Raises:
        ValueError: the table holds no such metric.
    """
    rows, left_out = _rows(_layers(table), {metric: metric})
    title, label = QUANTITIES[metric]
    cells = rows.pivot_table("value", ["depth", "layer"], "step", "mean", sort=True)
    cells = cells.iloc[:, :: -(-cells.shape[1] // _CELLS)].droplevel("depth")
    with _figure(left_out, size=(7.0, max(3.6, 0.22 * len(cells) + 1.2))) as (figure, axes, sns):
        angle = metric.endswith("angle")
        sns.heatmap(
            cells,
            ax=axes,
            cmap="viridis_r" if angle else "viridis",
            vmin=0 if angle else None,
            vmax=max(90.0, float(cells.max(axis=None))) if angle else None,
            cbar_kws={"label": label},
            xticklabels=max(1, cells.shape[1] // 8),
            yticklabels=1,
        )
        axes.set(xlabel="step", ylabel="", title=f"{title} by layer, input at the top")
        axes.tick_params(axis="y", labelsize="x-small", rotation=0)
        axes.tick_params(axis="x", rotation=0)
        axes.grid(False)
    return figure


def accuracy_and_angle(table: DataFrame) -> Figure:
    """Draw test accuracy, and below it the angle between gradients and backprop's: a line for each run.

    The angle is the mean over layers, in a band from the smallest to the largest.

    Raises:
        ValueError: the table holds no accuracy or no gradient angle.
    """
    accuracy, left_out = _rows(table, {"test_accuracy": "test_accuracy"})
    angles, more_left_out = _rows(_layers(table), {"gradient_angle": "gradient_angle"})
    runs = list(table["run"].unique())
    with _figure(left_out + more_left_out, rows=2, size=(7.0, 5.6)) as (figure, axes, sns):
        palette = sns.color_palette("colorblind", len(runs)) if len(runs) <= 10 else theme.sequence(len(runs))
        upper, lower = axes
        timed, clock = _timed(table, angles)
        by_run = {"x": clock, "y": "value", "hue": "run", "hue_order": runs, "palette": palette}
        sns.lineplot(_timed(table, accuracy)[0], ax=upper, errorbar=None, legend=len(runs) > 1, **by_run)
        sns.lineplot(timed, ax=lower, errorbar=("pi", 100), legend=False, **by_run)
        lower.axhline(90, linestyle=":", color=theme.ink())
        upper.set(xlabel="", ylabel="test accuracy [%]", title="Accuracy and mean gradient angle")
        lower.set(xlabel=clock, ylabel=f"gradient angle [°]\nmean of {angles['layer'].nunique()} layers")
        _scale(lower, "gradient_angle", float(angles["value"].max()))
        if len(runs) > 1:
            _legend_beside(upper)
    return figure


def error_against_concordance(
    runs: DataFrame, published: DataFrame | None = None, source: str = "published"
) -> Figure:
    """Draw test error against concordance: a line for each rule, in a band of the 95% interval over seeds.

    Args:
        runs: a row for each rule, concordance and seed: `rule`, `concordance` (0 to 1), `error` (percent).
            Rules without a concordance are drawn as horizontal lines.
        published: published errors to draw as dashed lines, with the same columns.
        source: where they are published, for the legend.

    Raises:
        ValueError: no rule has a concordance.
    """
    finite = runs[runs["error"].notna()]
    if finite["concordance"].notna().sum() == 0:
        raise NothingToDraw("no run has a concordance")
    with _figure(len(runs) - len(finite), whole=False) as (figure, axes, sns):
        for rule, part in finite.groupby("rule", sort=False):
            look = theme.look(rule)
            if part["concordance"].isna().all():
                axes.axhline(
                    part["error"].mean(), color=look.color, label=rule, dashes=look.dashes or (None, None)
                )
                continue
            line = {"x": "concordance", "y": "error", "color": look.color, "marker": look.marker, "ax": axes}
            label = f"{rule}: {_DRAWING[drawing]}" if (drawing := rules.drawing(rule)) else rule
            sns.lineplot(part, label=label, errorbar=_interval_ends, **line)
            if published is not None and not (theirs := published[published["rule"] == rule]).empty:
                label = f"{rule}, {source}"
                sns.lineplot(theirs, label=label, errorbar=None, linestyle="--", alpha=0.6, **line)
        if (finite["error"] > 0).all():  # a logarithmic axis has no 0
            axes.set_yscale("log")
        axes.set(
            xlabel="concordance: share of feedback signs that agree with W's",
            ylabel="best test error [%]",
            title="Error against concordance",
        )
        axes.yaxis.set_major_formatter("{x:g}")
        _legend_beside(axes)
    return figure


def _interval_ends(errors: Sequence[float]) -> tuple[float, float]:
    _, low, high = percent_interval(errors)
    return low, high


_DRAWING = {"fixed": "drawn once", "redrawn": "redrawn"}


FIGURES: dict[str, Callable[[DataFrame], Figure]] = {
    "error": error_against_epoch,
    **{metric: partial(layers_against_epoch, metric=metric) for metric in QUANTITIES},
    **{f"{metric}_map": partial(layer_heat_map, metric=metric) for metric in QUANTITIES if "angle" in metric},
    "accuracy_and_angle": accuracy_and_angle,
    "checks": draw_checks,
}
"""The figures of a run, by the names of their files."""


def draw_all(
    table: DataFrame,
    folder: str | os.PathLike[str],
    formats: Sequence[str] = ("png",),
    dpi: int = 150,
    figures: Sequence[str] = tuple(FIGURES),
) -> tuple[list[Path], dict[str, str]]:
    """Write each of these `FIGURES` for which the table has values.

    Returns:
        The files written, and the reason for each figure that was not drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    missing: dict[str, str] = {}
    for name in figures:
        try:
            figure = FIGURES[name](table)
        except NothingToDraw as nothing:
            missing[name] = str(nothing)
            continue
        for suffix in formats:
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=dpi)
    return written, missing


def draw_run(folder: Path) -> None:
    """Draw the figures of a run, from its table, into its folder."""
    draw_all(read(folder), folder / "figures")


def _layers(table: DataFrame) -> DataFrame:
    """The rows that belong to a layer. Layers without a depth come last, in the order of the rows."""
    rows = table[table["layer"].notna()]
    depth = rows.groupby("layer", sort=False)["depth"].min()
    unknown = depth[depth.isna()].index
    first = 0 if depth.isna().all() else int(depth.max()) + 1
    places = {**depth.dropna().to_dict(), **{name: first + place for place, name in enumerate(unknown)}}
    return rows.assign(depth=rows["layer"].map(places).astype(int))


def _rows(table: DataFrame, metrics: dict[str, str]) -> tuple[DataFrame, int]:
    """The finite rows of these metrics, with the names that they have in the figure, and the number of other
    rows."""
    import numpy as np

    rows = table[table["metric"].isin(list(metrics))]
    finite = rows[np.isfinite(rows["value"])]
    if finite.empty:
        how = ": set record.gradient_angle_every" if "gradient_angle" in metrics and rows.empty else ""
        raise NothingToDraw(f"the table holds no {' and no '.join(metrics)}{how}")
    return finite.assign(metric=finite["metric"].map(metrics)), len(rows) - len(finite)


def _timed(table: DataFrame, rows: DataFrame) -> tuple[DataFrame, str]:
    """The rows, and the column for the x axis: "epoch", in fractions between the steps at which epochs ended
    (beyond the last one, at its pace), or "step" if a table does not tell the length of an epoch."""
    import numpy as np
    import pandas as pd

    ends = table[table["metric"].isin(["test_error", "test_accuracy"])].sort_values("step")
    parts = []
    for run, part in rows.groupby("run", sort=False):
        of_run = ends[ends["run"] == run].drop_duplicates("step")
        if len(of_run) < 2:
            return rows, "step"
        step, epoch = of_run["step"].to_numpy(float), of_run["epoch"].to_numpy(float)
        pace = (epoch[-1] - epoch[-2]) / (step[-1] - step[-2])
        after = np.maximum(part["step"] - step[-1], 0) * pace
        parts.append(part.assign(epoch=np.interp(part["step"], step, epoch) + after))
    return pd.concat(parts), "epoch"


def _references(table: DataFrame, metric: str) -> Iterator[tuple[float, str]]:
    if metric.endswith("angle"):
        yield 90.0, "unrelated"
    if metric == "weight_angle":
        expected = table.loc[table["metric"] == "expected_weight_angle", "value"].dropna()
        if not expected.empty and abs(expected.mean() - 90) > 1:
            yield float(expected.mean()), "expected at the start"
    if metric == "norm_ratio":
        yield 1.0, "as large as W"
    if metric == "sign_agreement":
        yield 0.5, "by chance"


def _scale(axes: Axes, metric: str, highest: float) -> None:
    if metric.endswith("angle"):
        top = min(max(95.0, highest + 5), 180.0)
        axes.set(ylim=(-2, top), yticks=range(0, int(top) + 1, 15))  # so that a line at 0 is visible
    elif metric == "norm_ratio":
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.02)


@contextmanager
def _figure(
    left_out: int, rows: int = 1, size: tuple[float, float] = _SIZE, whole: bool = True
) -> Iterator[tuple[Figure, Any, Any]]:
    """Make a figure, its axes (one below another if there are several rows), and seaborn. The figure says how
    many values were left out. The x axis has whole numbers if ``whole``, else fractions of one."""
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    with theme.style():
        figure = Figure(figsize=theme.figsize(*size), layout="constrained")
        axes = figure.subplots(rows, sharex=True)
        yield figure, axes, sns
        every: Iterable[Axes] = [axes] if rows == 1 else axes
        for each in every:
            if not each.collections or rows > 1 or each.lines:
                each.xaxis.set_major_locator(MaxNLocator(integer=True) if whole else MultipleLocator(0.25))
                each.margins(x=0.01)
        if left_out:
            words = "value that is" if left_out == 1 else "values that are"
            figure.supxlabel(
                f"without {left_out} {words} not a number", fontsize="x-small", color=theme.ink()
            )


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=title)


def _depth_bar(figure: Figure, axes: Axes, colors: list[tuple[float, float, float]], first: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    ends = Normalize(first - 0.5, first + len(colors) - 0.5)
    scale = ScalarMappable(ends, ListedColormap(colors))
    ticks = MaxNLocator(integer=True)
    figure.colorbar(scale, ax=axes, label="depth of the layer, 0 at the input", ticks=ticks)
