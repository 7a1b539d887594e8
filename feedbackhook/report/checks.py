"""The last checks of each run (`record.check_every`), with verdicts: as a table, and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from feedbackhook.diagnosis.checks import KINDS, UNDEFINED, verdict
from feedbackhook.report import theme
from feedbackhook.report.errors import NothingToDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX, THRESHOLD = "check_", "_threshold"
METRICS = [f"{PREFIX}{kind}{end}" for kind in KINDS for end in ("", THRESHOLD)]
"""The recorded metrics from which verdicts follow."""

COLORS = {"passes": "#bfe0f5", "fails": "#e8933f", UNDEFINED: "#dcdcdc"}
"""As in the tables of sweeps: distinguishable for color-blind readers."""


def last_checks(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last checks of each run, a row for each layer and kind.

    The columns are `run, step, layer, depth, kind, value, threshold, verdict, outcome`; `outcome` is
    "passes", "fails" or "undefined". Layers without a name are the whole network.

    Args:
        rows: the tidy table of one or more runs.
    """
    rows = rows[rows["metric"].isin(METRICS)].copy()
    columns = ["run", "step", "layer", "depth", "kind", "value", "threshold", "verdict", "outcome"]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    for text in ("run", "layer", "metric"):
        rows[text] = rows[text].astype(object)
    rows = rows[rows["step"] == rows.groupby("run")["step"].transform("max")]
    rows["kind"] = rows["metric"].str.removeprefix(PREFIX).str.removesuffix(THRESHOLD)
    is_threshold = rows["metric"].str.endswith(THRESHOLD)
    keys = ["run", "step", "layer", "depth", "kind"]
    found = rows[~is_threshold][[*keys, "value"]].merge(
        rows[is_threshold][[*keys, "value"]].rename(columns={"value": "threshold"}), on=keys
    )
    found["verdict"] = [
        verdict(kind, value, threshold)
        for kind, value, threshold in zip(found["kind"], found["value"], found["threshold"], strict=True)
    ]
    fails = found["verdict"] == found["kind"].map(lambda kind: KINDS[kind].fails)
    outcome = np.where(fails, "fails", "passes")
    found["outcome"] = np.where(found["verdict"] == UNDEFINED, UNDEFINED, outcome)
    return found.sort_values(["run", "depth"], kind="stable")[columns]


def draw_checks(table: pd.DataFrame) -> Figure:
    """Draw the last checks of a run as a table: a row for each layer, a column for each check, and a color
    for each outcome. Of several runs, the first is drawn.

    Raises:
        NothingToDraw: the table holds no checks.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    checks = last_checks(table)
    if checks.empty:
        raise NothingToDraw("the table holds no checks: set record.check_every")
    run = checks["run"].iloc[0]
    checks = checks[(checks["run"] == run) & checks["layer"].notna()]
    layers = list(dict.fromkeys(checks["layer"]))
    with theme.style():
        size = (11.0, 1.9 + 0.3 * len(layers))
        figure = Figure(figsize=theme.figsize(*size), layout="constrained")
        axes = figure.subplots()
        for row in checks.to_dict("records"):
            x, y = list(KINDS).index(row["kind"]), layers.index(row["layer"])
            axes.fill_between([x, x + 0.97], y, y + 0.92, color=COLORS[row["outcome"]], linewidth=0)
            text = row["verdict"] if np.isnan(row["value"]) else f"{number(row['value'], row['kind'])} "
            text += "" if np.isnan(row["value"]) else row["verdict"]
            axes.text(x + 0.48, y + 0.46, text, ha="center", va="center", fontsize="x-small", color="#222222")
        axes.set_xticks(np.arange(len(KINDS)) + 0.48, [kind.title for kind in KINDS.values()])
        axes.set_yticks(np.arange(len(layers)) + 0.46, layers)
        axes.set(xlim=(0, len(KINDS)), ylim=(len(layers), 0), ylabel="layer, input at the top")
        axes.set_title(f"Can angles and gradients be trusted? {run}, step {checks['step'].iloc[0]}")
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize="small")
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
        handles = [Patch(facecolor=color, label=name) for name, color in COLORS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def number(value: float, kind: str) -> str:
    """Return a check's value in three digits, with its unit."""
    return f"{value:.3g}°" if kind == "angle" else f"{value:.3g}"
