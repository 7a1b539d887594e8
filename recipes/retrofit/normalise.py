"""What does a deep network that lacks normalisation need, before feedback weights can train it?

Trains the thirteen convolutions of VGG-16, which have no normalisation of their own, on digits. Under uSF the
error signal grows from layer to layer. The paper's two remedies are given to it one by one and together:
Batch Normalization (BN) behind each convolution, and Batch Manhattan (BM), which takes the signs of the
gradients alone. Beside them stands sign feedback whose V has the norm of W. Backprop is given the same.

    python recipes/retrofit/normalise.py
    python recipes/retrofit/normalise.py --datasets '[CIFAR10]' --data.root data --data.train_images 5000
    python recipes/retrofit/normalise.py --smoke                                            # seconds

normalise.yaml holds conditions and protocol, a sweep; any option of `feedbackhook sweep` may stand behind the
command. The same command goes on where it stopped, and what has ended is not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from feedbackhook.experiments.sweep.grid import stored
from feedbackhook.report import theme
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.runs import collect

YAML = Path(__file__).with_suffix(".yaml")
SMOKE = {
    **common.SMOKE,
    "protocol.lr_factors": "1",
    "record.every": "2",
}


def gradients(folder: Path) -> pd.DataFrame:
    """Norm of each layer's weight gradient in the first step, by condition and depth: what the error signal
    that arrives there makes of it. The learning rate has not acted yet, so one run tells for all."""
    runs = collect(folder)
    rows = runs.rows(of_layers=["gradient_norm"])
    rows = rows[rows["step"] == 0].assign(condition=rows["run"].map(runs.runs.set_index("run")["condition"]))
    return rows.drop_duplicates(["condition", "depth"])


def draw(folder: Path) -> Figure:
    """Best errors by condition, and the first gradients by depth."""
    cells = sweep_table(folder).cells
    conditions = list(stored(folder).conditions)
    first = gradients(folder)
    palette = dict(zip(conditions, sns.color_palette("colorblind", len(conditions)), strict=True))
    with theme.style():
        figure = Figure(figsize=theme.figsize(12.0, 4.6), layout="constrained")
        by_condition, by_depth = figure.subplots(1, 2)
        sns.barplot(
            cells,
            x="best_error",
            y="condition",
            hue="condition",
            palette=palette,
            ax=by_condition,
            legend=False,
        )
        for container in by_condition.containers:
            by_condition.bar_label(container, fmt=" %.1f")
        by_condition.set(xlabel="best test error [%]", ylabel="", xlim=(0, 114), xticks=range(0, 101, 20))
        finite = first[np.isfinite(first["value"]) & (first["value"] > 0)]
        shown = [name for name in conditions if "BM" not in name and name in set(finite["condition"])]
        sns.lineplot(
            finite[finite["condition"].isin(shown)],
            x="depth",
            y="value",
            hue="condition",
            style="condition",
            hue_order=shown,
            style_order=shown,
            palette=palette,
            ax=by_depth,
            markers=True,
        )
        by_depth.set(
            yscale="log",
            xlabel="depth of the layer, 0 at the input",
            ylabel="norm of the weight gradient",
            title="in the first step (under BM as without it)",
        )
        by_depth.legend(title=None, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = common.parser(__doc__, "runs/normalise")
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        others += common.options(SMOKE)
    common.sweep(YAML, given.output, others)
    draw(given.output).savefig(given.output / "normalise.png", dpi=150)
    print(given.output / "normalise.png")


if __name__ == "__main__":
    main()
