"""The paper's claim in a few minutes: how many feedback signs must agree with the forward weights' signs?

Trains the MNIST network of Liao, Leibo and Poggio (2016) on scikit-learn's digits (resized to 28x28) under
backprop, frSF and brSF at five concordances, and RndF, all with Batch Normalization and Batch Manhattan, and
under uSF with neither; three seeds each. Prints a table, draws a figure, and says where they lie. Runs that
are finished are not repeated, interrupted ones go on; remove the output folder to begin anew.

    make demo
    python recipes/liao2016/demo.py --epochs 5 --seeds 1
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import joblib
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from feedbackhook.experiments.config import (
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RunConfig,
)
from feedbackhook.experiments.training.run import train
from feedbackhook.report import theme
from feedbackhook.store.recorder import read
from feedbackhook.store.run_folder import RunResult

CONCORDANCES = (1.0, 0.75, 0.5, 0.25, 0.0)
# Fixed beforehand, not searched for. Batch Manhattan's is a step's size in each weight; SGD's, for uSF with
# neither normalisation nor Batch Manhattan, is the one with which the paper's schedule begins.
MANHATTAN_RATE = 5e-5
SGD_RATE = 5e-4


def conditions() -> list[dict[str, Any]]:
    """The conditions in the order of the table; concordance is None where the rule has none."""
    both = [
        {"rule": rule, "mode": rule, "concordance": concordance}
        for rule in ("frSF", "brSF")
        for concordance in CONCORDANCES
    ]
    return [
        {"rule": "backprop", "mode": None, "concordance": None},
        *both,
        {"rule": "RndF", "mode": "RndF", "concordance": None},
        {"rule": "uSF", "mode": "uSF", "concordance": None},
    ]


def configuration(condition: dict[str, Any], seed: int, epochs: int, output: Path) -> RunConfig:
    """One condition's run: uSF goes without Batch Normalization and Batch Manhattan, all others with both."""
    alone = condition["rule"] == "uSF"
    concordance = condition["concordance"]
    name = condition["rule"] + ("" if concordance is None else f"-{concordance:g}")
    return RunConfig(
        model=ModelConfig("liao2016/mnist", batch_norm="none" if alone else "paper"),
        feedback=FeedbackConfig(
            condition["mode"], {} if concordance is None else {"concordance": concordance}
        ),
        optimizer=OptimizerConfig("sgd", SGD_RATE)
        if alone
        else OptimizerConfig("batch_manhattan", MANHATTAN_RATE),
        protocol=ProtocolConfig(epochs=epochs, seed=seed, threads=1, device="cpu"),
        output=str(output / f"{name}-seed{seed}"),
    )


def summarise(results: list[tuple[dict[str, Any], int, RunResult]]) -> pd.DataFrame:
    """A row a run: condition, seed, last and best test error in percent, status."""
    return pd.DataFrame(
        {
            "rule": condition["rule"],
            "concordance": condition["concordance"],
            "seed": seed,
            "last_error": result.last_error,
            "best_error": result.best_error,
            "epochs": result.epoch,
            "status": result.status,
        }
        for condition, seed, result in results
    )


def as_table(runs: pd.DataFrame) -> Table:
    """A row a condition: the error of each seed, in the order of the seeds, and means over them."""
    seeds = sorted(runs["seed"].unique())
    title = "test error on digits [%] after the last epoch; best: mean of each seed's best"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    for heading in ("concordance", *(f"seed {seed}" for seed in seeds), "mean", "best"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    for (rule, concordance), group in runs.groupby(["rule", "concordance"], sort=False, dropna=False):
        ended = group["status"].value_counts()
        table.add_row(
            rule,
            "" if pd.isna(concordance) else f"{concordance:g}",
            *(f"{error:.2f}" for error in group.sort_values("seed")["last_error"]),
            f"{group['last_error'].mean():.2f}",
            f"{group['best_error'].mean():.2f}",
            ", ".join(f"{count} {status}" for status, count in ended.items()),
        )
    return table


def curves(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Test error by run and epoch, each row with its run's condition."""
    errors = table[table["metric"] == "test_error"].rename(columns={"value": "error"})
    return errors.merge(runs, on="run", validate="many_to_one")


def draw(runs: pd.DataFrame, errors: pd.DataFrame) -> plt.Figure:
    """Error against epoch for fixed and for redrawn magnitudes, and last error against concordance."""
    sns.set_theme(context="notebook", style="whitegrid")
    figure, (fixed, redrawn, last) = plt.subplots(1, 3, figsize=(15, 5.4), sharey=True, layout="constrained")
    every_seed = ("pi", 100)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False, "columnspacing": 1}
    for axes, rule, title in (
        (fixed, "frSF", "frSF: magnitudes and flips fixed"),
        (redrawn, "brSF", "brSF: redrawn after each update"),
    ):
        by_concordance = errors[errors["rule"] == rule].assign(
            concordance=lambda rows: rows["concordance"].map("{:g}".format)
        )
        of_backprop = errors[errors["rule"] == "backprop"].assign(concordance="backprop")
        order = [f"{concordance:g}" for concordance in CONCORDANCES]
        lines = {
            "x": "epoch",
            "y": "error",
            "hue": "concordance",
            "hue_order": [*order, "backprop"],
            "palette": [*sns.color_palette("viridis_r", len(order)), theme.look("backprop").color],
            "ax": axes,
        }
        sns.lineplot(by_concordance, errorbar=every_seed, **lines)
        sns.lineplot(of_backprop, errorbar=None, linestyle="--", legend=False, **lines)
        axes.get_legend().legend_handles[-1].set_linestyle("--")
        sns.move_legend(axes, ncols=3, title="concordance", **below)
        axes.set(
            title=title,
            xlabel="epoch",
            ylabel="test error [%]",
            xticks=range(0, errors["epoch"].max() + 1, 3),
        )

    sns.lineplot(
        runs.dropna(subset="concordance"),
        x="concordance",
        y="last_error",
        hue="rule",
        palette={rule: theme.look(rule).color for rule in ("frSF", "brSF")},
        style="rule",
        markers={rule: theme.look(rule).marker for rule in ("frSF", "brSF")},
        dashes=False,
        markersize=9,
        errorbar=every_seed,
        err_style="bars",
        err_kws={"capsize": 4},
        ax=last,
    )
    for rule, label, style in (
        ("backprop", "backprop", "--"),
        ("RndF", "RndF", "-."),
        ("uSF", "uSF without BN and BM", ":"),
    ):
        mean = runs.loc[runs["rule"] == rule, "last_error"].mean()
        last.axhline(mean, color=theme.look(rule).color, linestyle=style, label=label)
    last.set(title="after the last epoch", xlabel="concordance: probability of the same sign")
    ticks = [0.5, 1, 3, 10, 30, 100]
    last.set(yscale="log", ylim=(0.4, 110), yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
    last.legend(ncols=2, title="rule", **below)
    figure.suptitle(
        f"How many signs must agree? The paper's MNIST network on digits: "
        f"mean and range of {runs['seed'].nunique()} seeds"
    )
    return figure


def main(epochs: int = 15, seeds: int = 3, jobs: int | None = None, output: Path = Path("runs/demo")) -> None:
    """Train, print and draw.

    Args:
        epochs: passes over the training set.
        seeds: runs of each condition.
        jobs: processes, each on one thread; none: one for each core.
        output: the folder of the run folders, the table and the figure.
    """
    console = Console(soft_wrap=True)
    planned = [(condition, seed) for seed in range(seeds) for condition in conditions()]
    jobs = min(jobs or os.cpu_count() or 1, len(planned))
    console.print(
        f"{len(planned)} runs of {epochs} epochs, {jobs} at a time. Learning rates, fixed beforehand: "
        f"Batch Manhattan {MANHATTAN_RATE:g}; SGD {SGD_RATE:g} (uSF alone). Run folders: {output}"
    )
    began = time.perf_counter()
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        joblib.delayed(train)(configuration(condition, seed, epochs, output), resume=True)
        for condition, seed in planned
    )
    bar = track(finished, description="training", total=len(planned), console=console)
    runs = summarise([(*plan, result) for plan, result in zip(planned, bar, strict=True)])
    runs["run"] = [Path(configuration(*plan, epochs, output).output or "").name for plan in planned]

    console.print(as_table(runs))
    runs.to_csv(output / "errors.csv", index=False, float_format="%.4f")
    draw(runs, curves(runs, read(output))).savefig(output / "demo.png", dpi=120)
    console.print(f"{time.perf_counter() - began:.0f} s")
    console.print(f"table:  {output / 'errors.csv'}")
    console.print(f"figure: {output / 'demo.png'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
