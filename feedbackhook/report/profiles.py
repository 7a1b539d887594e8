"""The figure of a profile: gradient angles before training, by layer and by rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feedbackhook.report import theme
from feedbackhook.report.errors import NothingToDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_NAMED = 60  # number of rows whose names can be read


def draw(table: DataFrame, conditions: list[str]) -> Figure:
    """Draw the mean gradient angles of a profile: layers by condition as a heat map, and angle against depth
    with a band of one standard deviation.

    Args:
        table: as `Profile.table` returns it.
        conditions: the columns of the heat map, in their order.

    Raises:
        NothingToDraw: no gradient angle is defined.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    angles = table[(table["metric"] == "gradient_angle") & table["mean"].notna()]
    if angles.empty:
        raise NothingToDraw("no gradient angle is defined")
    layers = angles.drop_duplicates("layer").sort_values("depth")["layer"].tolist()
    with theme.style():
        height = min(14.0, max(4.6, 1.6 + 0.19 * len(layers)))
        figure = Figure(figsize=theme.figsize(12.5, height), layout="constrained")
        over, lines = figure.subplots(1, 2, width_ratios=[1.1, 1])
        grid = angles.pivot(index="layer", columns="condition", values="mean")
        sns.heatmap(
            grid.reindex(index=layers, columns=conditions),
            vmin=0,
            vmax=90,
            cmap="viridis_r",
            cbar_kws={"label": "mean angle to backprop's gradient [°]", "extend": "max"},
            yticklabels=len(layers) <= _NAMED,
            ax=over,
        )
        over.set(xlabel="", ylabel="layer, input at the top", title="Gradient angle")
        over.tick_params(axis="y", labelsize="x-small", rotation=0)
        over.set_xticks(over.get_xticks(), over.get_xticklabels(), rotation=25, ha="right")
        palette = colors_of(table, conditions)
        for condition in conditions:
            part = angles[angles["condition"] == condition].sort_values("depth")
            lines.plot(part["depth"], part["mean"], color=palette[condition], label=condition)
            low, high = part["mean"] - part["std"], part["mean"] + part["std"]
            lines.fill_between(part["depth"], low, high, color=palette[condition], alpha=0.15, linewidth=0)
        lines.axhline(90, linestyle=":", color=theme.ink())
        top = max(95.0, float((angles["mean"] + angles["std"].fillna(0)).max()) + 3)
        lines.set(
            xlabel="depth of the layer, 0 at the input",
            ylabel="mean angle to backprop's gradient [°]",
            title="Gradient angle against depth",
            ylim=(-3, min(top, 180)),
            yticks=range(0, int(min(top, 180)) + 1, 15),
        )
        lines.legend(frameon=False, fontsize="small", loc="lower left")
    return figure


def colors_of(table: DataFrame, conditions: list[str]) -> dict[str, object]:
    """Return a color for each condition: a scale over the concordances of a rule, the theme's for others."""
    rows = table.drop_duplicates("condition").set_index("condition")
    found: dict[str, object] = {}
    for mode in dict.fromkeys(rows.loc[conditions, "mode"]):
        own = [name for name in conditions if rows.loc[name, "mode"] == mode]
        if len(own) > 1:
            found.update(zip(own, theme.sequence(len(own)), strict=True))
        else:
            found[own[0]] = theme.look(mode).color
    return found
