"""The results of characters.py: tables of runs and layers, the choice of learning rates, the figure."""

from __future__ import annotations

import math
import re

import pandas as pd
import seaborn as sns
from loop_recipes import LAST_LAYER_COLOR, Result, rule_colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from feedbackhook.report import theme


def name_of(rule: str, lr: float, seed: int) -> str:
    """Return the name of the run's folder."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', rule)}-lr{lr:g}-seed{seed}"


def summarize(results: list[Result]) -> pd.DataFrame:
    """Return a row per run; `chosen` marks the runs at their rule's best learning rate."""
    keys = ("rule", "lr", "seed")
    runs = pd.DataFrame(
        {
            "run": name_of(*(result["settings"][key] for key in keys)),
            **{key: result["settings"][key] for key in keys},
            **{key: result[key] for key in ("val_bits", "test_bits", "status", "seconds")},
        }
        for result in results
    )
    return runs.assign(chosen=runs["lr"] == runs["rule"].map(best_lrs(runs)))


def best_lrs(runs: pd.DataFrame) -> dict[str, float]:
    """Return each rule's learning rate with the smallest validation loss of the first seed.

    Runs that diverged come last.
    """
    first = runs[runs["seed"] == runs["seed"].min()]
    losses = first["val_bits"].where(first["status"] == "finished", math.inf)
    return {rule: first.loc[part.idxmin(), "lr"] for rule, part in losses.groupby(first["rule"], sort=False)}


def last_angles(runs: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the last weight and gradient angles of the chosen runs, in degrees.

    Each layer has a row. The row without a layer is about all weights together.
    """
    rows = metrics[metrics["metric"].isin(["weight_angle", "gradient_angle"])].sort_values("step")
    last = rows.groupby(["run", "depth", "layer", "metric"], dropna=False)["value"].last().unstack("metric")
    chosen = runs.loc[runs["chosen"], ["run", "rule", "seed"]]
    return chosen.merge(last.reset_index(), on="run").sort_values(["run", "depth"], kind="stable")


def shown(runs: pd.DataFrame, layers: pd.DataFrame) -> Table:
    """Show a row per rule at its learning rate: each seed's loss and the mean angles below the head."""
    title = "test loss in bits per character; last angles in degrees, mean of the layers below the head"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    seeds = sorted(runs["seed"].unique())
    for heading in ("lr", *(f"seed {seed}" for seed in seeds), "mean", "gradient angle", "weight angle"):
        table.add_column(heading, justify="right")
    below = layers[layers["layer"].notna() & (layers["layer"] != "head")]
    means = below.groupby("rule")[["gradient_angle", "weight_angle"]].mean()
    for rule, part in runs[runs["chosen"]].groupby("rule", sort=False):
        diverged = int((part["status"] != "finished").sum())
        angles = [f"{angle:.1f}" for angle in means.loc[rule]] if rule in means.index else ["-", "-"]
        table.add_row(
            rule + (f" ({diverged} diverged)" if diverged else ""),
            f"{part['lr'].iloc[0]:g}",
            *(f"{bits:.3f}" for bits in part.sort_values("seed")["test_bits"]),
            f"{part['test_bits'].mean():.3f}",
            *angles,
        )
    return table


def draw(
    runs: pd.DataFrame, metrics: pd.DataFrame, layers: pd.DataFrame, count_bits: tuple[float, float]
) -> Figure:
    """Draw loss and gradient angle by step, and the last angles by layer: mean and range of seeds."""
    order = list(runs["rule"].unique())
    colors = {
        **rule_colors(),
        "random, attention exact": theme.look("brSF").color,
        "head alone": LAST_LAYER_COLOR,
    }
    rows = metrics.merge(runs.loc[runs["chosen"], ["run", "rule"]], on="run")
    by_rule = {"hue": "rule", "hue_order": order, "palette": colors, "errorbar": ("pi", 100)}
    with theme.style():
        figure = Figure(figsize=theme.figsize(12.5, 9.5), layout="constrained")
        (loss, over_steps), at_the_end = figure.subplots(2, 2)
        whole = rows[rows["layer"].isna() & (rows["metric"] == "test_bits")]
        sns.lineplot(whole, x="step", y="value", ax=loss, **by_rule)
        loss.set(title="Test loss", ylabel="bits per character", ylim=(None, 6.9))
        for bits, words in zip(count_bits, ("counts of characters", "counts of pairs"), strict=True):
            _reference_line(loss, bits, words)

        below = rows["layer"].notna() & (rows["layer"] != "head")  # the head's angle is 0
        angles = rows[below & (rows["metric"] == "gradient_angle")]
        angles = angles.groupby(["run", "rule", "step"], as_index=False)["value"].mean()
        sns.lineplot(angles, x="step", y="value", ax=over_steps, legend=False, **by_rule)
        over_steps.set(
            title="Gradient angle, mean of the layers below the head",
            ylabel="angle to backprop's gradient [°]",
        )
        _draw_last_angles(at_the_end, layers, by_rule)
        for axes in (over_steps, *at_the_end):
            axes.axhline(90, linestyle=":", color=theme.ink())
            axes.set(ylim=(-3, 100), yticks=range(0, 91, 15))
        handles, labels = loss.get_legend_handles_labels()
        loss.get_legend().remove()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _reference_line(axes: Axes, bits: float, words: str) -> None:
    axes.axhline(bits, linestyle=":", color=theme.ink())
    axes.annotate(
        words,
        (1, bits),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 3),
        ha="right",
        textcoords="offset points",
        fontsize="x-small",
        color=theme.ink(),
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        zorder=10,
    )


def _draw_last_angles(panels: list[Axes], layers: pd.DataFrame, by_rule: dict[str, object]) -> None:
    by_layer = layers[layers["layer"].notna()]
    # the depth counts patched layers only, so where some are exact it is smaller
    order = by_layer.groupby("layer")["depth"].max().sort_values().index
    by_layer = by_layer.assign(layer=pd.Categorical(by_layer["layer"], order, ordered=True))
    for axes, metric, title, label in (
        (panels[0], "gradient_angle", "Gradient angle at the end", "angle to backprop's gradient [°]"),
        (panels[1], "weight_angle", "Weight angle at the end", "angle between V and W [°]"),
    ):
        sns.lineplot(by_layer, x="layer", y=metric, marker="o", ax=axes, legend=False, **by_rule)
        axes.set(title=title, ylabel=label, xlabel="layer, input to output")
        for text in axes.get_xticklabels():
            text.set(rotation=60, ha="right", rotation_mode="anchor")
