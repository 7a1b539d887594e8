"""Draw each rule's angles over training, for its section in docs/rules.md, from the committed runs on digits.

    python analysis/rule_angles.py

Reads the sweeps `digits` and `learned/digits` in analysis/runs/rules and writes docs/figures/rules.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from jsonargparse import auto_cli
from PIL import Image

from feedbackhook.report import theme
from feedbackhook.report.runs import describe
from feedbackhook.store import manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
SWEEPS = ("digits", "learned/digits")
SAYS = {
    "weight_angle": "V and W",
    "error_angle": "error signals by V and W",
    "gradient_angle": "gradient and backprop's",
}
"""What each recorded angle is between; a panel each, if it was recorded."""
RULES = {
    **{f"{rule}+BN+BM": rule for rule in ("uSF", "NuSF", "RndF", "FA", "uSF-SN", "uSF-init")},
    **{f"{rule}+BN+BM concordance=1": rule for rule in ("brSF", "frSF")},
    "angle+BN+BM degrees=45": "angle",
    **{
        f"{rule}+BN+BM": rule
        for rule in ("sign-symmetry", "noise", "sparse", "quantized", "low_rank", "toeplitz", "svd")
    },
    **{f"{rule}+BN+BM": rule for rule in ("DFA", "sDFA", "DRTP")},
    **{rule: rule for rule in ("KP", "WM", "information", "symmetric-alignment", "activation-alignment")},
    **{rule: rule for rule in ("PFA", "PFA-o", "LDFA", "DKP")},
}
"""The figure's name of each condition that has one."""


def angles(folder: Path) -> pd.DataFrame:
    """Return the angles that the runs of a sweep recorded: `condition`, `seed`, `metric`, `layer`, `depth`,
    `step` and `value` in degrees. The first layer, which sends no error signal on, has its gradient angle
    alone."""
    found = describe(path for run in manifest.read(folder).runs if (path := folder / run.name).is_dir())
    rows = found.rows(of_layers=list(SAYS)).dropna(subset="value")
    rows = rows[(rows["depth"] > 0) | (rows["metric"] == "gradient_angle")]
    rows = rows.merge(found.runs[["run", "condition", "seed"]], on="run")
    return rows[["condition", "seed", "metric", "layer", "depth", "step", "value"]]


def draw(rows: pd.DataFrame) -> Figure:
    """Draw the angles of one condition's layers against the step, a panel for each kind of angle: the mean
    over seeds in a band from the lowest to the highest."""
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    layers = rows.drop_duplicates("layer").sort_values("depth")["layer"].tolist()
    colors = dict(zip(layers, theme.sequence(len(layers)), strict=True))
    panels = [metric for metric in SAYS if (rows["metric"] == metric).any()]
    with theme.style():
        width = 3.0 * len(panels)
        figure = Figure(figsize=theme.figsize(width, 2.7), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            of = rows[rows["metric"] == metric]
            style = {"hue": "layer", "hue_order": layers, "palette": colors, "legend": False}
            sns.lineplot(of, x="step", y="value", errorbar=("pi", 100), ax=axes, **style)
            axes.axhline(90, linestyle=":", linewidth=1, color=theme.ink())
            axes.set_title(SAYS[metric], fontsize="small")
            axes.set(
                xlabel="step", ylabel="", ylim=(0, max(100.0, of["value"].max() + 5)), yticks=(0, 30, 60, 90)
            )
        figure.supylabel("angle [°]", fontsize="medium")
        handles = [Line2D([], [], color=color, label=layer) for layer, color in colors.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def main(runs: Path = HERE / "runs/rules", output: Path = HERE.parent / "docs/figures/rules") -> None:
    """Draw the figures.

    Args:
        runs: folder of the sweeps.
        output: folder to write.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = pd.concat([angles(runs / sweep) for sweep in SWEEPS])
    for condition, rule in RULES.items():
        drawn = BytesIO()
        draw(rows[rows["condition"] == condition]).savefig(drawn, dpi=90)
        few_colors = Image.open(drawn).convert("RGB").quantize(64)  # a third of the size
        few_colors.save(output / f"{rule}.png", optimize=True)


if __name__ == "__main__":
    auto_cli(main)
