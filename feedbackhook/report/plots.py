"""Figures from the tidy table (see feedbackhook.recorder) and nothing else.

Each function returns a matplotlib Figure of its own, without pyplot's global state, so that it draws with
and without a display.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["angles_against_epoch", "error_against_epoch"]

_SIZE = (7.0, 4.2)  # inches
_NAMED_LAYERS = 12  # more than these and a legend of names is no longer read


def error_against_epoch(table: DataFrame) -> Figure:
    """Error in percent against epoch: a line a run, on the test set (solid) and in training (dashed).

    Raises:
        ValueError: the table holds no error.
    """
    rows = _rows(table, {"test_error": "test", "train_error": "training"})
    runs = list(rows["run"].unique())
    with _axes() as (figure, axes, sns):
        # ten colours that colour-blind readers tell apart; more runs than that are an ordered scale
        palette = sns.color_palette("colorblind" if len(runs) <= 10 else "viridis", len(runs))
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


def angles_against_epoch(table: DataFrame) -> Figure:
    """Angle between V and W in degrees against epoch: a line a layer, coloured by its depth.

    The dotted line at 90 degrees is where V says nothing about W. Of several runs the mean is drawn,
    in a band of one standard deviation.

    Raises:
        ValueError: the table holds no weight angle.
    """
    rows = _rows(table, {"weight_angle": "weight_angle"})
    layers = rows.sort_values("depth")["layer"].unique().tolist()
    named = len(layers) <= _NAMED_LAYERS
    top = min(max(95.0, float(rows["value"].max()) + 5), 180.0)
    with _axes() as (figure, axes, sns):
        palette = sns.color_palette("viridis", len(layers))
        sns.lineplot(
            rows,
            x="epoch",
            y="value",
            hue="layer",
            hue_order=layers,
            palette=palette,
            errorbar="sd",
            legend=named,
            ax=axes,
        )
        axes.axhline(90, linestyle=":", color="0.3")
        axes.set(xlabel="epoch", ylabel="angle between V and W [°]", title="Weight angle against epoch")
        axes.set(ylim=(0, top), yticks=range(0, int(top) + 1, 15))
        if named:
            _legend_beside(axes, "layer, input to output")
        else:
            _depth_bar(figure, axes, palette)
    return figure


def _rows(table: DataFrame, metrics: dict[str, str]) -> DataFrame:
    """The finite rows of these metrics, under the names that they have in the figure."""
    import numpy as np

    rows = table[table["metric"].isin(list(metrics)) & np.isfinite(table["value"])]
    if rows.empty:
        raise ValueError(f"the table holds no {' and no '.join(metrics)}")
    return rows.assign(metric=rows["metric"].map(metrics))


@contextmanager
def _axes() -> Iterator[tuple[Figure, Axes, Any]]:
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        yield figure, axes, sns
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=title)


def _depth_bar(figure: Figure, axes: Axes, colours: list[tuple[float, float, float]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    scale = ScalarMappable(Normalize(-0.5, len(colours) - 0.5), ListedColormap(colours))
    ticks = MaxNLocator(integer=True)
    figure.colorbar(scale, ax=axes, label="depth of the layer, 0 at the input", ticks=ticks)
