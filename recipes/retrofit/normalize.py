"""What does a deep network without normalization need, so that feedback weights can train it?

Trains the thirteen convolutions of VGG-16, which has no normalization, on digits. Under uSF the error signal
grows from layer to layer. Tries the paper's two remedies, one at a time and together: Batch Normalization
(BN) after each convolution, and Batch Manhattan (BM), which uses only the signs of the gradients. For
comparison, also trains sign feedback whose V has the norm of W, and backprop with the same remedies.

    python recipes/retrofit/normalize.py
    python recipes/retrofit/normalize.py --datasets '[CIFAR10]' --data.root data --data.train_images 5000
    python recipes/retrofit/normalize.py --smoke                                            # seconds

normalize.yaml holds the conditions and protocol, a sweep. You may add any option of `feedbackhook sweep` to
the command. Rerun the same command to resume; finished runs are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import sweep_recipes
from matplotlib.figure import Figure

from feedbackhook.experiments.sweep.grid import stored
from feedbackhook.report import theme
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.runs import collect

YAML = Path(__file__).with_suffix(".yaml")
SMOKE = {
    **sweep_recipes.SMOKE,
    "protocol.lr_factors": "1",
    "record.every": "2",
}


def gradients(folder: Path) -> pd.DataFrame:
    """Return the norm of each layer's weight gradient in the first step, by condition and depth.

    The learning rate has had no effect yet, so one run per condition is enough.
    """
    runs = collect(folder)
    rows = runs.rows(of_layers=["gradient_norm"])
    rows = rows[rows["step"] == 0].assign(condition=rows["run"].map(runs.runs.set_index("run")["condition"]))
    return rows.drop_duplicates(["condition", "depth"])


def draw(folder: Path) -> Figure:
    """Draw the best errors by condition, and the first gradients by depth."""
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
            title="in the first step (the same with and without BM)",
        )
        by_depth.legend(title=None, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = sweep_recipes.parser(__doc__, "runs/normalize")
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        others += sweep_recipes.options(SMOKE)
    sweep_recipes.sweep(YAML, given.output, others)
    draw(given.output).savefig(given.output / "normalize.png", dpi=150)
    print(given.output / "normalize.png")


if __name__ == "__main__":
    main()
