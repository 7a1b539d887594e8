"""What do the paper's experiments A to C2 take? Runs, hours and disk, from a rehearsal for each dataset.

The rehearsal is that of `feedbackhook sweep --dry-run`: some steps of the dataset's network, with random
images of its size, on the device that is here. No data are needed.

    python benchmarks/cost.py

Writes benchmarks/results/cost.csv, a row for each experiment and dataset. Nothing else should be at work.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from common import RESULTS
from jsonargparse import ArgumentParser, auto_cli

from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.estimates import estimate
from feedbackhook.experiments.plan import plan

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
                    "gigabytes": sum(run.size for run in found.values()) / 1e9,
                }
            )
            print("{experiment} {dataset}: {runs} runs, {hours:.1f} h, {gigabytes:.2f} GB".format(**rows[-1]))
    table = pd.DataFrame(rows)
    table.insert(3, "device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, a thread")
    table.to_csv(RESULTS / "cost.csv", index=False, float_format="%.4g")
    print(table.groupby("experiment")[["runs", "hours", "gigabytes"]].sum().to_string())


if __name__ == "__main__":
    auto_cli(main)
