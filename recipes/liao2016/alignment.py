"""Under fixed random feedback the forward weights come to align with it: when, and how far?

Trains the MNIST network of Liao, Leibo and Poggio (2016) under RndF by plain SGD, watches its layers, and
tells for each seed when the error angle of the hidden fully connected layer falls below a bound. Finished
runs are not repeated, interrupted ones go on; remove the output folder to begin anew.

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


def summarise(table: pd.DataFrame, bound: float) -> pd.DataFrame:
    """A row a run: the error angle of `LAYER` at the start and at the end, in degrees, the first step and the
    epoch in which it is below the bound (missing if it never is), and the last test error in percent."""
    rows = []
    for run, of_run in table.groupby("run"):
        angles = of_run[(of_run["metric"] == "error_angle") & (of_run["layer"] == LAYER)].sort_values("step")
        below = angles[angles["value"] < bound]
        errors = of_run[of_run["metric"] == "test_error"].sort_values("step")
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
        data: a dataset, as of `feedbackhook train --data.name`.
        root: the folder in which torchvision keeps its datasets.
        download: let torchvision download it.
        epochs: passes over the training set.
        seeds: runs.
        lr: SGD's learning rate in the first epochs; momentum is 0.9, weight decay 5e-4.
        bound: degrees.
        threads: CPU threads of a run; null: torch's own number.
        output: the folder of the run folders, the tables and the figure.
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
    runs = summarise(table, bound)
    console.print(_shown(runs, bound))
    runs.to_csv(output / "alignment.csv", index=False, float_format="%.3f")
    measured = table[table["metric"].isin(["error_angle", "weight_angle"]) & table["layer"].notna()]
    measured.to_csv(output / "angles.csv", index=False, float_format="%.3f")
    layers_against_epoch(table, "error_angle").savefig(output / "error_angle.png", dpi=150)
    for name in ("alignment.csv", "angles.csv", "error_angle.png"):
        console.print(output / name)


def _shown(runs: pd.DataFrame, bound: float) -> Table:
    title = f"error angle of {LAYER} [°]: fixed random feedback, and forward weights that align with it"
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
