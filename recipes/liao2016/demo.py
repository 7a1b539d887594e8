"""The paper's claim in a few minutes: how many feedback signs must match the forward weights' signs?

Trains the MNIST network of Liao, Leibo and Poggio (2016) on scikit-learn's digits (resized to 28x28), with
two seeds each: under backprop, frSF and brSF at five concordances, and RndF, all with Batch Normalization
and Batch Manhattan; and under uSF with neither. Prints a table and draws a figure. Finished runs are not
repeated and interrupted ones resume; remove the output folder to start over.

    make demo
    python recipes/liao2016/demo.py --epochs 5 --seeds 1
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import joblib
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from jsonargparse import auto_cli
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from feedbackhook.experiments.config import (
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.training.run import train
from feedbackhook.report import theme
from feedbackhook.store.recorder import read
from feedbackhook.store.run_folder import RunResult

CONCORDANCES = (1.0, 0.75, 0.5, 0.25, 0.0)
# Chosen beforehand, without a search. With Batch Manhattan it is the size of the step of each weight. SGD's,
# for uSF with neither Batch Normalization nor Batch Manhattan, is the initial rate of the paper's schedule,
# which is for gradients summed over the mini-batch.
MANHATTAN_LR = 5e-5
SGD_LR = 5e-4

# Small mini-batches give about as many updates in a few epochs as mini-batches of 100 give in fifteen.
BATCH_SIZE = 30

TOLD_EVERY = 10.0  # seconds between lines about finished runs, if there is no terminal
TABLE_WIDTH = 100  # characters; rich would cut the numbers of a narrower table
EVERY_SEED = ("pi", 100)  # error bars from the smallest to the largest value
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False, "columnspacing": 1}


def conditions() -> list[dict[str, Any]]:
    """Return the conditions in the table's order; `concordance` is None if the rule has none."""
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
    """Return the configuration of a run: all but uSF have Batch Normalization and Batch Manhattan."""
    plain = condition["rule"] == "uSF"
    concordance = condition["concordance"]
    name = condition["rule"] + ("" if concordance is None else f"-{concordance:g}")
    return RunConfig(
        model=ModelConfig("liao2016/mnist", batch_norm="none" if plain else "paper"),
        feedback=FeedbackConfig(
            condition["mode"], {} if concordance is None else {"concordance": concordance}
        ),
        optimizer=OptimizerConfig("sgd", SGD_LR)
        if plain
        else OptimizerConfig("batch_manhattan", MANHATTAN_LR),
        protocol=ProtocolConfig(
            epochs=epochs,
            batch_size=BATCH_SIZE,
            seed=seed,
            threads=1,
            device="cpu",
            reduction="sum" if plain else "mean",
        ),
        record=RecordConfig(weights="none"),
        output=str(output / f"{name}-seed{seed}"),
    )


def summarize(results: list[tuple[dict[str, Any], int, RunResult]]) -> pd.DataFrame:
    """Return a row per run: condition, seed, last and best test error in percent, status."""
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
    """Show a row per condition: the error of each seed, and the means."""
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
    """Return the test error by run and epoch, with the condition of each run."""
    errors = table[table["metric"] == "test_error"].rename(columns={"value": "error"})
    return errors.merge(runs, on="run", validate="many_to_one")


def draw(runs: pd.DataFrame, errors: pd.DataFrame) -> plt.Figure:
    """Draw error against epoch for fixed and for redrawn magnitudes, and last error against concordance."""
    sns.set_theme(context="notebook", style="whitegrid")
    figure, (fixed, redrawn, last) = plt.subplots(1, 3, figsize=(15, 5.4), sharey=True, layout="constrained")
    _draw_epochs(fixed, errors, "frSF", "frSF: magnitudes and flips fixed")
    _draw_epochs(redrawn, errors, "brSF", "brSF: redrawn after each update")
    _draw_last_errors(last, runs)
    figure.suptitle(
        f"How many signs must agree? The paper's MNIST network on digits: "
        f"mean and range of {runs['seed'].nunique()} seeds"
    )
    return figure


def _draw_epochs(axes: plt.Axes, errors: pd.DataFrame, rule: str, title: str) -> None:
    order = [f"{concordance:g}" for concordance in CONCORDANCES]
    lines = {
        "x": "epoch",
        "y": "error",
        "hue": "concordance",
        "hue_order": [*order, "backprop"],
        "palette": [*sns.color_palette("viridis_r", len(order)), theme.look("backprop").color],
        "ax": axes,
    }
    by_concordance = errors[errors["rule"] == rule].assign(
        concordance=lambda rows: rows["concordance"].map("{:g}".format)
    )
    backprop = errors[errors["rule"] == "backprop"].assign(concordance="backprop")
    sns.lineplot(by_concordance, errorbar=EVERY_SEED, **lines)
    sns.lineplot(backprop, errorbar=None, linestyle="--", legend=False, **lines)
    axes.get_legend().legend_handles[-1].set_linestyle("--")
    sns.move_legend(axes, ncols=3, title="concordance", **BELOW)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(title=title, xlabel="epoch", ylabel="test error [%]")


def _draw_last_errors(axes: plt.Axes, runs: pd.DataFrame) -> None:
    looks = {rule: theme.look(rule) for rule in ("frSF", "brSF")}
    sns.lineplot(
        runs.dropna(subset="concordance"),
        x="concordance",
        y="last_error",
        hue="rule",
        palette={rule: look.color for rule, look in looks.items()},
        style="rule",
        markers={rule: look.marker for rule, look in looks.items()},
        dashes=False,
        markersize=9,
        errorbar=EVERY_SEED,
        err_style="bars",
        err_kws={"capsize": 4},
        ax=axes,
    )
    for rule, label, style in (
        ("backprop", "backprop", "--"),
        ("RndF", "RndF", "-."),
        ("uSF", "uSF without BN and BM", ":"),
    ):
        mean = runs.loc[runs["rule"] == rule, "last_error"].mean()
        axes.axhline(mean, color=theme.look(rule).color, linestyle=style, label=label)
    axes.set(title="after the last epoch", xlabel="concordance: probability of the same sign")
    ticks = [0.5, 1, 3, 10, 30, 100]
    axes.set(yscale="log", ylim=(0.4, 110), yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
    axes.legend(ncols=2, title="rule", **BELOW)


def told(finished: Iterable[RunResult], count: int, console: Console) -> Iterator[RunResult]:
    """Yield each run, and tell how far the work is: a bar on a terminal, else a line now and then."""
    began = last = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=count)
        for number, result in enumerate(finished, 1):
            run = f"{result.folder.name} {result.status} with {result.last_error:.2f}% test error"
            bar.update(task, completed=number, description=f"training: {run}")
            now = time.perf_counter()
            if not console.is_terminal and (now - last > TOLD_EVERY or number == count):
                last = now
                console.print(f"{now - began:4.0f} s: {number} of {count} runs; {run}")
            yield result


def main(epochs: int = 5, seeds: int = 2, jobs: int | None = None, output: Path = Path("runs/demo")) -> None:
    """Train, print and draw.

    Args:
        epochs: Passes over the training set.
        seeds: Runs of each condition.
        jobs: Number of processes; each uses one thread (default: the number of cores).
        output: Folder of the run folders, the table and the figure.
    """
    console = Console(soft_wrap=True)
    console.width = max(console.width, TABLE_WIDTH)
    planned = [(condition, seed) for seed in range(seeds) for condition in conditions()]
    configs = [configuration(condition, seed, epochs, output) for condition, seed in planned]
    jobs = min(jobs or os.cpu_count() or 1, len(planned))
    console.print(
        f"The paper's MNIST network learns scikit-learn's digits: {len(planned)} runs of {epochs} epochs, "
        f"{jobs} at a time. Learning rates: Batch Manhattan {MANHATTAN_LR:g}; SGD {SGD_LR:g} (uSF). "
        f"Run folders: {output}"
    )
    began = time.perf_counter()
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(
        joblib.delayed(train)(config, resume=True) for config in configs
    )
    results = {result.folder.name: result for result in told(finished, len(configs), console)}
    names = [Path(config.output or "").name for config in configs]
    runs = summarize([(*plan, results[name]) for plan, name in zip(planned, names, strict=True)])
    runs["run"] = names

    console.print(as_table(runs))
    runs.to_csv(output / "errors.csv", index=False, float_format="%.4f")
    draw(runs, curves(runs, read(output))).savefig(output / "demo.png", dpi=120)
    console.print(f"{time.perf_counter() - began:.0f} s")
    console.print(f"table:  {output / 'errors.csv'}")
    console.print(f"figure: {output / 'demo.png'}")


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
