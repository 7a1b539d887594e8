"""In which layers do the signs matter, and when?

Trains a ResNet-20 on digits with sign feedback in some layers and exact backprop in the others, at three
concordances: feedback in one part of the network only, and in all parts but one. Also trains with a
concordance that falls or rises with depth, or during training (`patch.set`).

    python recipes/retrofit/layers.py
    python recipes/retrofit/layers.py --datasets '[CIFAR10]' --data.root data --data.train_images 5000
    python recipes/retrofit/layers.py --smoke                                               # seconds

layers.yaml holds the protocol, a sweep. You may add any option of `feedbackhook sweep` to the command. Rerun
the same command to resume; finished runs are not repeated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
import sweep_recipes
import yaml
from matplotlib.figure import Figure

import feedbackhook
from feedbackhook.experiments.config import ModelConfig
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.sweep.grid import stored
from feedbackhook.report import theme
from feedbackhook.report.runs import collect

YAML = Path(__file__).with_suffix(".yaml")
CONCORDANCES = (1.0, 0.75, 0.5)
ALONE, BUT = "only {} at {:g}", "all but {} at {:g}"
SMOKE = {
    **sweep_recipes.SMOKE,
    "data.train_images": "20",
    "protocol.epochs": "7",  # as in the schedules of layers.yaml
    "protocol.seeds": "1",
}


def parts(model: str) -> list[str]:
    """Return the names of the network's parts, from input to output.

    The first layer is left out, because it sends no error signal back.
    """
    layers = feedbackhook.patch(build(ModelConfig(model), 10, 3, (32, 32)), "sign").layers
    return list(dict.fromkeys(layer.name.partition(".")[0] for layer in layers[1:]))


def conditions(model: str) -> dict[str, dict[str, Any]]:
    """Return two conditions per part and concordance: feedback in this part only, and in all others."""
    made: dict[str, dict[str, Any]] = {}
    for concordance in CONCORDANCES:
        rule = {"mode": "sign", "options": {"concordance": concordance}}
        for part in parts(model):
            layers = rf"{re.escape(part)}(\..*)?"
            made[ALONE.format(part, concordance)] = {"feedback": {**rule, "include": layers}}
            made[BUT.format(part, concordance)] = {"feedback": {**rule, "exclude": layers}}
    return made


def draw(folder: Path) -> Figure:
    """Draw two heat maps of mean errors by part and concordance, and the errors of the other conditions."""
    names = parts(str(stored(folder).model.name))
    all_layers = list(yaml.safe_load(YAML.read_text())["conditions"])
    runs = collect(folder).runs
    mean = runs.groupby("condition")["last_error"].mean()
    maps = [
        pd.DataFrame(
            [[mean.get(of.format(part, value)) for value in CONCORDANCES] for part in names],
            index=names,
            columns=[f"{value:g}" for value in CONCORDANCES],
        ).astype(float)
        for of in (ALONE, BUT)
    ]
    backprop = float(mean["backprop"])
    scale = {"vmin": backprop, "vmax": max(float(table.max(axis=None)) for table in maps)}
    with theme.style():
        figure = Figure(figsize=theme.figsize(12.0, 4.4), layout="constrained")
        *map_axes, rest_axes = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.6))
        for axes, table, what in zip(map_axes, maps, ("rerouted alone", "exact alone"), strict=True):
            sns.heatmap(
                table,
                annot=True,
                fmt=".1f",
                cmap="viridis",
                ax=axes,
                cbar=axes is map_axes[-1],
                cbar_kws={"label": "test error [%]"},
                **scale,
            )
            axes.set(xlabel="concordance of what is rerouted", ylabel="", title=f"this part {what}")
            axes.tick_params(axis="y", rotation=0)
        sns.stripplot(
            runs[runs["condition"].isin(all_layers)],
            x="last_error",
            y="condition",
            order=all_layers,
            ax=rest_axes,
            color=theme.look("sign").color,
        )
        rest_axes.axvline(backprop, color=theme.look("backprop").color, linestyle="--")
        rest_axes.set(xlabel="test error after the last epoch [%]", ylabel="", title="all layers rerouted")
        rest_axes.set_xlim(left=0)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = sweep_recipes.parser(__doc__, "runs/layers")
    parser.add_argument("--model.name", dest="model", default="cifar/resnet20", help="network to train")
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        others += sweep_recipes.options(SMOKE)
    planned = yaml.safe_load(YAML.read_text())["conditions"] | conditions(given.model)
    as_yaml = yaml.safe_dump(planned, sort_keys=False, default_flow_style=True)
    chosen = ["--model.name", given.model, "--conditions", as_yaml]
    sweep_recipes.sweep(YAML, given.output, [*chosen, *others])
    draw(given.output).savefig(given.output / "layers.png", dpi=150)
    print(given.output / "layers.png")


if __name__ == "__main__":
    main()
