"""Which networks learn from scratch through feedback weights?

Trains five networks by backprop, by sign feedback at concordances 1 and 0.75, and by random feedback, with
timm's augmentation: ResNet-20 and ResNet-18 for small images with SGD, and ViT-tiny, ConvNeXt-atto and an
MLP-Mixer with timm's AdamW.

    python recipes/retrofit/scratch.py
    python recipes/retrofit/scratch.py --networks resnet20 vit --datasets '[CIFAR10]' --data.root data \\
        --data.size 32 --data.augmentation '{scale: [0.6, 1], hflip: 0.5, auto_augment: rand-m9-n2}'
    python recipes/retrofit/scratch.py --smoke                                              # seconds

scratch.yaml holds the conditions and protocol, a sweep. You may add any option of `feedbackhook sweep` to the
command. Rerun the same command to resume; finished runs are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
import sweep_recipes
from matplotlib.figure import Figure

from feedbackhook.report import theme
from feedbackhook.report.aggregate import sweep_table

YAML = Path(__file__).with_suffix(".yaml")
SGD = {"optimizer.name": "sgd", "optimizer.lr": "0.05"}
ADAMW = {"optimizer.name": "timm/adamw", "optimizer.lr": "0.001", "optimizer.weight_decay": "0.05"}
NETWORKS: dict[str, dict[str, str]] = {
    "resnet20": {"model.name": "cifar/resnet20", **SGD},
    "resnet18": {"model.name": "cifar/resnet18", **SGD},
    "vit": {
        "model.name": "timm/vit_tiny_patch16_224",
        "model.options": "{{img_size: {size}, patch_size: 4}}",
        **ADAMW,
    },
    "convnext": {"model.name": "timm/convnext_atto", "model.options": "{{patch_size: {patch}}}", **ADAMW},
    "mixer": {
        "model.name": "cifar/mixer",
        "model.options": "{{img_size: {size}}}",
        **ADAMW,
    },
}
SMOKE = {
    **sweep_recipes.SMOKE,
    "protocol.lr_factors": "1",
    "record.every": "100",
}


def errors(folder: Path, networks: Sequence[str]) -> pd.DataFrame:
    """Return the best errors by network and condition."""
    cells = pd.concat(sweep_table(folder / name).cells.assign(network=name) for name in networks)
    return cells[["network", "condition", "best_error", "best_epoch", "runs", "ended"]]


def draw(cells: pd.DataFrame) -> Figure:
    """Draw the best errors as bars."""
    conditions = list(cells["condition"].unique())
    with theme.style():
        figure = Figure(figsize=theme.figsize(9.0, 4.4), layout="constrained")
        axes = figure.subplots()
        sns.barplot(
            cells,
            x="network",
            y="best_error",
            hue="condition",
            hue_order=conditions,
            palette=sweep_recipes.condition_colors(conditions),
            ax=axes,
        )
        for container in axes.containers:
            axes.bar_label(container, fmt="%.1f", fontsize="small")
        axes.set(xlabel="", ylabel="best test error [%]")
        axes.legend(title=None, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = sweep_recipes.parser(__doc__, "runs/scratch")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--data.size", dest="size", type=int, default=16, help="height and width of the images: 16 or 32"
    )
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        others += sweep_recipes.options(SMOKE)
    for name in given.networks:
        network = {
            key: value.format(size=given.size, patch=given.size // 16)
            for key, value in NETWORKS[name].items()
        }
        chosen = sweep_recipes.options({**network, "data.size": str(given.size)})
        sweep_recipes.sweep(YAML, given.output / name, [*chosen, *others])
    found = errors(given.output, given.networks)
    found.to_csv(given.output / "errors.csv", index=False, float_format="%.2f")
    draw(found).savefig(given.output / "scratch.png", dpi=150)
    print(given.output / "errors.csv", given.output / "scratch.png", sep="\n")


if __name__ == "__main__":
    main()
