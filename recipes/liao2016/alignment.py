"""Under fixed random feedback, when do the forward weights align with the feedback weights, and how far?

Trains the MNIST network of Liao, Leibo and Poggio (2016) under RndF by plain SGD, and records the angles of
its layers. For each seed, prints when the error angle of the hidden fully connected layer falls below a
bound. Finished runs are not repeated and interrupted ones resume; remove the output folder to start over.

    python recipes/liao2016/alignment.py --root data --download true
    python recipes/liao2016/alignment.py --data digits --epochs 15 --seeds 1
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from feedbackhook.experiments.config import (
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.training.run import train
from feedbackhook.report.plots import layers_against_epoch
from feedbackhook.store.recorder import read

LAYER = "fc1"


def summarize(table: pd.DataFrame, bound: float) -> pd.DataFrame:
    """Return a row per run: angles of `LAYER` in degrees, and the last test error in percent.

    `step_below` and `epoch_below` are the first in which the angle is below the bound, missing if it never
    is.
    """
    rows = []
    for run, part in table.groupby("run"):
        angles = part[(part["metric"] == "error_angle") & (part["layer"] == LAYER)].sort_values("step")
        below = angles[angles["value"] < bound]
        errors = part[part["metric"] == "test_error"].sort_values("step")
        rows.append(
            {
                "run": run,
                "first_angle": angles["value"].iloc[0],
                "last_angle": angles["value"].iloc[-1],
                "step_below": below["step"].min(),
                "epoch_below": below["epoch"].min(),
                "test_error": errors["value"].iloc[-1],
            }
        )
    return pd.DataFrame(rows).astype({"step_below": "Int64", "epoch_below": "Int64"})


def main(
    data: str = "MNIST",
    root: str = "data",
    download: bool = False,
    epochs: int = 10,
    seeds: int = 5,
    lr: float = 5e-3,
    bound: float = 75.0,
    threads: int | None = None,
    output: Path = Path("runs/alignment"),
) -> None:
    """Train, print and draw.

    Args:
        data: Name of a dataset, as in `feedbackhook train --data.name`.
        root: Folder of torchvision's datasets.
        download: Let torchvision download the dataset.
        epochs: Passes over the training set.
        seeds: Number of runs.
        lr: SGD's initial learning rate; the momentum is 0.9, the weight decay 5e-4.
        bound: Bound on the error angle, in degrees.
        threads: CPU threads of a run (default: PyTorch's choice).
        output: Folder of the run folders, the tables and the figure.
    """
    console = Console(soft_wrap=True)
    for seed in track(range(seeds), description="training", console=console):
        train(
            RunConfig(
                data=DataConfig(data, root, download),
                model=ModelConfig("liao2016/mnist"),
                feedback=FeedbackConfig("RndF"),
                optimizer=OptimizerConfig("sgd", lr),
                protocol=ProtocolConfig(epochs=epochs, seed=seed, threads=threads),
                record=RecordConfig(every=50),
                output=str(output / f"seed{seed}"),
            ),
            resume=True,
        )
    table = read(output)
    runs = summarize(table, bound)
    console.print(shown(runs, bound))
    runs.to_csv(output / "alignment.csv", index=False, float_format="%.3f")
    measured = table[table["metric"].isin(["error_angle", "weight_angle"]) & table["layer"].notna()]
    measured.to_csv(output / "angles.csv", index=False, float_format="%.3f")
    layers_against_epoch(table, "error_angle").savefig(output / "error_angle.png", dpi=150)
    for name in ("alignment.csv", "angles.csv", "error_angle.png"):
        console.print(output / name)


def shown(runs: pd.DataFrame, bound: float) -> Table:
    """Show a row per run."""
    title = f"error angle of {LAYER} [°]: forward weights align with fixed random feedback"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for heading in ("run", "at the start", "at the end", f"below {bound:g} from", "test error [%]"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for row in runs.to_dict("records"):
        when = (
            "never" if pd.isna(row["step_below"]) else f"step {row['step_below']}, epoch {row['epoch_below']}"
        )
        angles = (f"{row['first_angle']:.1f}", f"{row['last_angle']:.1f}")
        table.add_row(row["run"], *angles, when, f"{row['test_error']:.2f}")
    return table


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
