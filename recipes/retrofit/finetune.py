"""What happens if a pretrained network is fine-tuned through feedback weights? How many signs must agree, and
at which depth?

Fine-tunes a network with ImageNet weights on a part of CIFAR-10: by backprop, by sign feedback with random
magnitudes at four concordances, and by random feedback; its classifier alone, its last stages, or the whole
of it. Angles between V and W, and between the gradients and backprop's, are recorded before, during and
after.

    python recipes/retrofit/finetune.py --data.root data --data.download true
    python recipes/retrofit/finetune.py --depth head
    python recipes/retrofit/finetune.py --depth last --protocol.seeds 1
    python recipes/retrofit/finetune.py --model.name timm/resnet18 --model.weights hub      # or a file's name
    python recipes/retrofit/finetune.py --smoke                                             # seconds

Conditions, learning rates and protocol are in finetune.yaml, a sweep; any option of `feedbackhook sweep` may
stand behind the command. The same command goes on where it stopped, and what has ended is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import common
import pandas as pd
import seaborn as sns
import timm
from matplotlib.figure import Figure
from timm.models import group_parameters

from feedbackhook.experiments.sweep.grid import stored
from feedbackhook.report import theme
from feedbackhook.report.runs import collect

YAML = Path(__file__).with_suffix(".yaml")
LAST_STAGES = 3  # of the groups in which timm counts a network's layers, the classifier among them
HEAD = {"backprop": {"feedback": {"mode": None}, "optimizer": {"lr": 0.03}}}
DEPTHS = ("head", "last", "whole")
SMOKE = {
    **common.SMOKE,
    "datasets": "[digits]",
    "data.size": "32",
    "model.weights": "null",
    "protocol.seeds": "1",
    "record.gradient_angle_every": "2",
}


def trained(model: str, depth: str) -> list[str]:
    """The options that let a model of timm's learn at this depth alone. To the classifier every rule is
    backprop, since no error signal goes on from there."""
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
    """A row a run; their test errors by epoch; and the angles of each layer by step. `trained` is the depth
    of training, `depth` that of a layer."""
    found = collect(folder)
    runs = found.runs.assign(trained=found.runs["folder"].map(lambda run: Path(run).parent.name))
    what = runs.set_index("run")[["trained", "condition", "seed"]]
    errors = found.rows(["test_error"]).join(what, on="run")
    angles = found.rows(of_layers=["gradient_angle", "weight_angle"]).join(what, on="run")
    columns = ["run", *what.columns, "learning_rate", "last_error", "best_error", "best_epoch"]
    return runs[columns], errors, angles


def draw(folder: Path) -> Figure:
    """Error by depth; against epoch, of the deepest; and its gradients' angles to backprop's, by layer."""
    runs, errors, angles = recorded(folder)
    depths = [depth for depth in DEPTHS if depth in set(runs["trained"])]
    deepest = depths[-1]
    conditions = list(stored(folder / deepest).conditions)
    errors = errors[errors["trained"] == deepest]
    angles = angles[(angles["trained"] == deepest) & (angles["metric"] == "gradient_angle")].dropna(
        subset="value"
    )
    by = {"hue": "condition", "hue_order": conditions, "palette": common.colours(conditions)}
    with theme.style():
        figure = Figure(figsize=theme.figsize(12.0, 7.6), layout="constrained")
        (by_depth, by_epoch), of_layers = figure.subplots(2, 2)
        sns.stripplot(
            runs, x="trained", y="last_error", order=depths, dodge=True, ax=by_depth, legend=False, **by
        )
        by_depth.set(
            xlabel="what is trained",
            ylabel="test error [%]",
            title="after the last epoch, a point a seed",
            ylim=(0, None),
        )
        sns.lineplot(errors, x="epoch", y="value", errorbar=("pi", 100), ax=by_epoch, legend=True, **by)
        by_epoch.set(xlabel="epoch", ylabel="test error [%]", title=f"training: {deepest}", ylim=(0, 100))
        by_epoch.legend(title=None, frameon=False, loc="lower left", fontsize="small")
        for axes, when, title in zip(of_layers, ("min", "max"), ("before", "after"), strict=True):
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
    """runs.csv; angles.csv, means over seeds, of V and W at the start and the end; and the figure."""
    runs, _, angles = recorded(folder)
    keys = ["trained", "condition", "step", "layer", "depth", "metric"]
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
    parser = common.parser(__doc__, "runs/finetune")
    parser.add_argument("--depth", choices=DEPTHS, default="whole", help="what is trained: its end, or all")
    parser.add_argument("--model.name", dest="model", default="timm/tf_efficientnet_lite0", help="timm/NAME")
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        given.model = "timm/test_efficientnet"
        others += common.options(SMOKE)
    what = ["--model.name", given.model, *trained(given.model, given.depth)]
    common.sweep(YAML, given.output / given.depth, [*what, *others])
    print(*write(given.output), sep="\n")


if __name__ == "__main__":
    main()
