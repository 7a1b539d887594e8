"""In which layers do the signs matter, and when?

Trains a ResNet-20 on digits with sign feedback in some layers and exact backprop in the rest: one part of the
network rerouted and all others exact, and the other way round, at three concordances. Beside that,
concordance that falls or rises with depth, and over training (`patch.set`).

    python recipes/retrofit/layers.py
    python recipes/retrofit/layers.py --datasets '[CIFAR10]' --data.root data --data.train_images 5000
    python recipes/retrofit/layers.py --smoke                                               # seconds

layers.yaml holds the protocol, a sweep; any option of `feedbackhook sweep` may stand behind the command. The
same command goes on where it stopped, and what has ended is not repeated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import pandas as pd
import seaborn as sns
import yaml
from matplotlib.figure import Figure

from feedbackhook.experiments.config import ModelConfig
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.sweep.grid import stored
from feedbackhook.report import theme
from feedbackhook.report.runs import collect
from feedbackhook.selection import layers_in

YAML = Path(__file__).with_suffix(".yaml")
CONCORDANCES = (1.0, 0.75, 0.5)
ALONE, BUT = "only {} at {:g}", "all but {} at {:g}"
SMOKE = {
    **common.SMOKE,
    "protocol.seeds": "1",
}


def parts(model: str) -> list[str]:
    """The network's parts by name, from the input to the output, without the first layer, which has no one to
    send an error signal to."""
    network = build(ModelConfig(model), 10, 3, (32, 32))
    return list(dict.fromkeys(name.partition(".")[0] for name in list(layers_in(network))[1:]))


def conditions(model: str) -> dict[str, dict[str, Any]]:
    """For each part and concordance, the part alone rerouted, and all others but the part."""
    made: dict[str, dict[str, Any]] = {}
    for concordance in CONCORDANCES:
        rule = {"mode": "sign", "options": {"concordance": concordance}}
        for part in parts(model):
            of_part = rf"{re.escape(part)}(\..*)?"
            made[ALONE.format(part, concordance)] = {"feedback": {**rule, "include": of_part}}
            made[BUT.format(part, concordance)] = {"feedback": {**rule, "exclude": of_part}}
    return made


def draw(folder: Path) -> Figure:
    """Two heat maps, mean errors of seeds by part and concordance; and the errors of the other conditions."""
    config = stored(folder)
    names, own = parts(str(config.model.name)), yaml.safe_load(YAML.read_text())["conditions"]
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
        *of_maps, of_rest = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.6))
        for axes, table, what in zip(of_maps, maps, ("rerouted alone", "exact alone"), strict=True):
            sns.heatmap(
                table,
                annot=True,
                fmt=".1f",
                cmap="viridis",
                ax=axes,
                cbar=axes is of_maps[-1],
                cbar_kws={"label": "test error [%]"},
                **scale,
            )
            axes.set(xlabel="concordance of what is rerouted", ylabel="", title=f"this part {what}")
            axes.tick_params(axis="y", rotation=0)
        rest = runs[runs["condition"].isin(list(own))]
        sns.stripplot(
            rest, x="last_error", y="condition", order=list(own), ax=of_rest, color=theme.look("sign").color
        )
        of_rest.axvline(backprop, color=theme.look("backprop").color, linestyle="--")
        of_rest.set(xlabel="test error after the last epoch [%]", ylabel="", title="all layers rerouted")
        of_rest.set_xlim(left=0)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = common.parser(__doc__, "runs/layers")
    parser.add_argument("--model.name", dest="model", default="cifar/resnet20", help="the network")
    given, others = parser.parse_known_args(arguments)
    if given.smoke:
        others += common.options(SMOKE)
    own = yaml.safe_load(YAML.read_text())["conditions"]
    all_of_them = yaml.safe_dump(own | conditions(given.model), sort_keys=False, default_flow_style=True)
    what = ["--model.name", given.model, "--conditions", all_of_them]
    common.sweep(YAML, given.output, [*what, *others])
    draw(given.output).savefig(given.output / "layers.png", dpi=150)
    print(given.output / "layers.png")


if __name__ == "__main__":
    main()
