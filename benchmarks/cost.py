"""What do the paper's experiments A to C2 take? Runs, hours and disk, from a rehearsal for each dataset.

The rehearsal is that of `feedbackhook sweep --dry-run`: some steps of the dataset's network, with random
images of its size, on the device that is here. No data are needed.

    python benchmarks/cost.py

Floating-point operations are counted on one image, forward and backward, by torch.utils.flop_counter.
Writes benchmarks/results/cost.csv, a row for each experiment and dataset. Nothing else should be at work.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from common import RESULTS
from jsonargparse import ArgumentParser, auto_cli
from torch.utils.flop_counter import FlopCounterMode

from feedbackhook.experiments.config import ModelConfig, SweepConfig
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.models import build as models
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.sweep.estimate import estimate
from feedbackhook.experiments.sweep.grid import PlannedRun, plan

RECIPES = Path(__file__).parents[1] / "recipes" / "liao2016"


def main(experiments: list[str] = ["a", "b", "c1", "c2"]) -> None:  # noqa: B006 - never changed
    """Rehearses, writes and prints.

    Args:
        experiments: of recipes/liao2016/experiment_NAME.yaml.
    """
    parser = ArgumentParser()
    parser.add_class_arguments(SweepConfig)
    rows = []
    for name in experiments:
        given = parser.parse_path(str(RECIPES / f"experiment_{name}.yaml"))
        config = SweepConfig(**vars(parser.instantiate(given)))
        for dataset in config.datasets:
            runs = plan(replace(config, datasets=[dataset]))
            found = estimate(runs)
            rows.append(
                {
                    "experiment": name.upper(),
                    "dataset": dataset,
                    "network": runs[0].config.model.name,
                    "runs": len(runs),
                    "hours": sum(run.seconds for run in found.values()) / 3600,
                    "petaflop": sum(_flops(run) for run in runs) / 1e15,
                    "gigabytes": sum(run.size for run in found.values()) / 1e9,
                }
            )
            print(
                ", ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else str(value)
                    for name, value in rows[-1].items()
                )
            )
    table = pd.DataFrame(rows)
    table.insert(3, "device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, a thread")
    table.to_csv(RESULTS / "cost.csv", index=False, float_format="%.4g")
    print(table.groupby("experiment")[["runs", "hours", "petaflop", "gigabytes"]].sum().to_string())


def _flops(run: PlannedRun) -> float:
    """Of the whole run: each image forward and backward, those evaluated forward, a third of that."""
    config, known = resolve(run.config), DATASETS[run.dataset]
    channels, height, width = models.default_size(config.model.name)
    held_out = round(known.train * config.data.val_fraction)
    images = known.train - held_out + (known.test + held_out) / 3
    of_image = _of_image(config.model.name, channels, height, width, known.classes)
    return of_image * images * config.protocol.epochs


@cache
def _of_image(name: str, channels: int, height: int, width: int, classes: int) -> int:
    model = models.build(ModelConfig(name), classes, channels, (height, width))
    x = torch.randn(2, channels, height, width)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    auto_cli(main)
