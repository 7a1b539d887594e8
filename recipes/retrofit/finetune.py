"""What happens if you fine-tune a pretrained network through feedback weights?

How many signs must match, and at which depth? Fine-tunes a network with ImageNet weights on a part of
CIFAR-10, by backprop, by sign feedback with random magnitudes at four concordances, and by random feedback.
Trains the classifier alone, the last stages, or the whole network. Records the angles between V and W, and
between the gradients and backprop's, before, during and after training.

It begins with a profile, which compares the gradients under sign and random feedback with backprop's before
any training, in about a minute: OUTPUT/profile-DEPTH.

    python recipes/retrofit/finetune.py --data.root data --data.download true
    python recipes/retrofit/finetune.py --depth head
    python recipes/retrofit/finetune.py --depth last --protocol.seeds 1
    python recipes/retrofit/finetune.py --model.name timm/resnet18 --model.weights hub      # or a file name
    python recipes/retrofit/finetune.py --smoke                                             # seconds

finetune.yaml holds the conditions, learning rates and protocol, a sweep. You may add any option of
`feedbackhook sweep` to the command. Rerun the same command to resume; finished runs are not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
import sweep_recipes
import timm
from matplotlib.figure import Figure
from timm.models import group_parameters

from feedbackhook.experiments.sweep.grid import stored
from feedbackhook.report import theme
from feedbackhook.report.runs import collect

YAML = Path(__file__).with_suffix(".yaml")
LAST_STAGES = 3  # of the groups into which timm divides a network's layers, including the classifier
HEAD = {"backprop": {"feedback": {"mode": None}, "optimizer": {"lr": 0.03}}}
DEPTHS = ("head", "last", "whole")
SMOKE = {
    **sweep_recipes.SMOKE,
    "datasets": "[digits]",
    "data.size": "32",
    "model.weights": "null",
    "protocol.seeds": "1",
    "record.gradient_angle_every": "2",
}


def trainable(model: str, depth: str) -> list[str]:
    """Return the options that make a timm model learn at this depth only.

    For the classifier alone, backprop is the only condition: no error signal passes below it, so all rules
    are the same.
    """
    if depth == "whole":
        return []
    network = timm.create_model(model.removeprefix("timm/"))
    groups = group_parameters(network, network.group_matcher(coarse=True))
    last = sorted(groups)[-1 if depth == "head" else -LAST_STAGES :]
    parts = {".".join(name.split(".")[:2]) for group in last for name in groups[group]}
    pattern = "|".join(sorted(part.replace(".", r"\.") for part in parts))
    alone = ["--conditions", json.dumps(HEAD)] if depth == "head" else []
    return ["--model.trainable", rf"({pattern})(\..*)?", *alone]


def recorded(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return the runs, their test errors by epoch, and the angles of each layer by step.

    The column `trainable` is what was trained, `depth` is the depth of a layer.
    """
    found = collect(folder)
    runs = found.runs.assign(trainable=found.runs["folder"].map(lambda run: Path(run).parent.name))
    labels = runs.set_index("run")[["trainable", "condition", "seed"]]
    errors = found.rows(["test_error"]).join(labels, on="run")
    angles = found.rows(of_layers=["gradient_angle", "weight_angle"]).join(labels, on="run")
    columns = ["run", *labels.columns, "learning_rate", "last_error", "best_error", "best_epoch"]
    return runs[columns], errors, angles


def draw(folder: Path) -> Figure:
    """Draw the errors by depth, then the errors by epoch and the gradient angles of the deepest."""
    runs, errors, angles = recorded(folder)
    depths = [depth for depth in DEPTHS if depth in set(runs["trainable"])]
    deepest = depths[-1]
    conditions = list(stored(folder / deepest).conditions)
    errors = errors[errors["trainable"] == deepest]
    angles = angles[(angles["trainable"] == deepest) & (angles["metric"] == "gradient_angle")].dropna(
        subset="value"
    )
    by = {"hue": "condition", "hue_order": conditions, "palette": sweep_recipes.condition_colors(conditions)}
    with theme.style():
        figure = Figure(figsize=theme.figsize(12.0, 7.6), layout="constrained")
        (by_depth, by_epoch), by_layer = figure.subplots(2, 2)
        sns.stripplot(
            runs, x="trainable", y="last_error", order=depths, dodge=True, ax=by_depth, legend=False, **by
        )
        by_depth.set(
            xlabel="what is trained",
            ylabel="test error [%]",
            title="after the last epoch, a point per seed",
            ylim=(0, None),
        )
        sns.lineplot(errors, x="epoch", y="value", errorbar=("pi", 100), ax=by_epoch, legend=True, **by)
        by_epoch.set(xlabel="epoch", ylabel="test error [%]", title=f"training: {deepest}", ylim=(0, 100))
        by_epoch.legend(title=None, frameon=False, loc="lower left", fontsize="small")
        for axes, when, title in zip(by_layer, ("min", "max"), ("before", "after"), strict=True):
            step = angles.groupby("run")["step"].transform(when)
            sns.lineplot(
                angles[angles["step"] == step],
                x="depth",
                y="value",
                errorbar=("pi", 100),
                ax=axes,
                legend=False,
                **by,
            )
            axes.axhline(90, linestyle=":", color=theme.ink())
            axes.set(
                xlabel="depth of the layer, 0 at the input",
                ylabel="angle to backprop's gradient [°]",
                title=f"{title} training: {deepest}",
                ylim=(-3, 123),
                yticks=range(0, 121, 30),
            )
    return figure


def write(folder: Path) -> list[Path]:
    """Write runs.csv, angles.csv and the figure.

    angles.csv holds means over seeds: gradient angles of all steps, weight angles of the first and last step.
    """
    runs, _, angles = recorded(folder)
    keys = ["trainable", "condition", "step", "layer", "depth", "metric"]
    means = angles.groupby(keys, sort=False)["value"].mean().reset_index()
    steps = means.groupby("metric")["step"]
    ends = (means["step"] == 0) | (means["step"] == steps.transform("max"))
    means = means[ends | (means["metric"] == "gradient_angle")]
    paths = [folder / name for name in ("runs.csv", "angles.csv", "finetune.png")]
    runs.to_csv(paths[0], index=False, float_format="%.4g")
    means.to_csv(paths[1], index=False, float_format="%.1f")
    draw(folder).savefig(paths[2], dpi=150)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = sweep_recipes.parser(__doc__, "runs/finetune")
    parser.add_argument("--depth", choices=DEPTHS, default="whole", help="what to train")
    parser.add_argument(
        "--model.name", dest="model", default="timm/tf_efficientnet_lite0", help="network to train, timm/NAME"
    )
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        given.model = "timm/test_efficientnet"
        others += sweep_recipes.options(SMOKE)
    chosen = ["--model.name", given.model, *trainable(given.model, given.depth)]
    if given.depth != "head" and "--dry-run" not in others:  # the head's gradient is always backprop's
        folder = given.output / f"profile-{given.depth}"
        sweep_recipes.profile(YAML, folder, [*chosen, *others], ["sign", "random"])
    sweep_recipes.sweep(YAML, given.output / given.depth, [*chosen, *others])
    print(*write(given.output), sep="\n")


if __name__ == "__main__":
    main()
