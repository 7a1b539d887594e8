"""The results of tabular.py: the summary, the printed tables and the figure."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from loop_recipes import LAST_LAYER_COLOR, RULES, Result, rule_colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from tabular_data import REGRESSION

from feedbackhook.report import theme
from feedbackhook.report.statistics import interval

LAST_ALONE = "last layer alone"
ARCHITECTURE = ["depth", "normalization"]


def summarize(results: list[Result]) -> pd.DataFrame:
    """Return a row per condition: mean score, its 95% interval over folds, and mean gradient angle."""
    names = ("table", *ARCHITECTURE, "rule")
    return pd.DataFrame(
        {
            **{name: result["settings"][name] for name in names},
            "measure": "R²" if result["settings"]["table"] in REGRESSION else "accuracy [%]",
            **interval(result["scores"])._asdict(),
            "gradient_angle": np.mean(result["angles"]) if result["angles"] else np.nan,
            **{f"fold {fold}": score for fold, score in enumerate(result["scores"])},
            "seconds": result["seconds"],
        }
        for result in results
    )


def label(depth: int, normalization: str) -> str:
    """Describe an architecture in two short lines."""
    return f"{depth} hidden\n" + ("no norm" if normalization == "none" else normalization)


def shown(name: str, conditions: pd.DataFrame) -> Table:
    """Show a row per rule and a column per architecture: the mean and half the width of its 95% interval."""
    digits = 3 if name in REGRESSION else 1
    title = f"{name}: test {conditions['measure'].iloc[0]}, mean and 95% interval over folds"
    table = Table(title=title.replace("[", r"\["), box=box.SIMPLE, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    columns = list(conditions.groupby(ARCHITECTURE, sort=False).groups)
    for column in columns:
        table.add_column(label(*column), justify="right", no_wrap=True)
    for rule, part in conditions.groupby("rule", sort=False):
        cells = part.set_index(ARCHITECTURE)
        rows = [cells.loc[column] for column in columns]
        table.add_row(
            rule, *(f"{row['mean']:.{digits}f} ± {row['high'] - row['mean']:.{digits}f}" for row in rows)
        )
    return table


def draw(conditions: pd.DataFrame) -> Figure:
    """Draw the scores and their intervals: a panel per table, a marker per rule."""
    names = list(conditions["table"].unique())
    with theme.style():
        across = len(names) if len(names) <= 3 else 2
        down = -(-len(names) // across)
        figure = Figure(figsize=theme.figsize(5.4 * across, 4.4 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes, name in itertools.zip_longest(grid.flat, names):
            if name is None:
                axes.remove()
            else:
                _draw_table(axes, name, conditions[conditions["table"] == name])
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_table(axes: Axes, name: str, conditions: pd.DataFrame) -> None:
    colors = {**rule_colors(), LAST_ALONE: LAST_LAYER_COLOR}
    markers = dict(zip((*RULES, LAST_ALONE), "sPDoX^", strict=True))
    columns = list(conditions.groupby(ARCHITECTURE, sort=False).groups)
    rules = list(conditions["rule"].unique())
    for number, rule in enumerate(rules):
        rows = conditions[conditions["rule"] == rule].set_index(ARCHITECTURE).loc[columns]
        shift = (number - (len(rules) - 1) / 2) * 0.13
        axes.errorbar(
            np.arange(len(columns)) + shift,
            rows["mean"],
            yerr=rows["high"] - rows["mean"],
            fmt=markers[rule],
            color=colors[rule],
            label=rule,
            capsize=2,
        )
    axes.set_xticks(range(len(columns)), [label(*column) for column in columns])
    axes.set(title=name, ylabel=f"test {conditions['measure'].iloc[0]}")
    axes.grid(visible=False, axis="x")
