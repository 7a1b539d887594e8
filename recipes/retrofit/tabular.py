"""Which depth, which normalisation and how many right signs does learning on tables need?

Trains multilayer perceptrons on tables that scikit-learn ships (breast cancer, wine, digits' 64 features, and
diabetes as a regression), with more and fewer hidden layers, without and with normalisation, under backprop,
sign feedback at three concordances, random feedback, and with the last layer trained alone. Measured is the
test score of each of five folds: accuracy, or R²; and the angle to backprop's gradient at the end.

Folds are fixed: shuffled with seed 0, by class where there are classes; features and a regression's target
are standardised by the training part. The learning rate is one for all, fixed beforehand. Finished conditions
are not repeated; remove the output folder to begin anew.

    python recipes/retrofit/tabular.py
    python recipes/retrofit/tabular.py --smoke true --output runs/tabular-smoke
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn import datasets
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor, nn

import feedbackhook
from feedbackhook.report import theme
from feedbackhook.report.statistics import interval
from feedbackhook.store.atomic import atomic_write

LAST_ALONE = "last layer alone"  # not a rule of feedback: all other layers stay as they were drawn
RULES: dict[str, dict[str, Any] | None] = {
    "backprop": None,
    "sign 1": {"mode": "sign", "concordance": 1.0},
    "sign 0.75": {"mode": "sign", "concordance": 0.75},
    "sign 0.5": {"mode": "sign", "concordance": 0.5},
    "random": {"mode": "random"},
    LAST_ALONE: None,
}
"""What `feedbackhook.patch` is given beside the model, by the name in the table; None: no patch."""

TABLES = {
    "breast_cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "digits": datasets.load_digits,
    "diabetes": datasets.load_diabetes,
}
REGRESSION = ("diabetes",)
NORMALISATIONS = {"none": None, "LayerNorm": nn.LayerNorm, "BatchNorm": nn.BatchNorm1d}


# --- data and model ---------------------------------------------------------------------------------------


def folds(table: str, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Training features and targets, test features and targets of each fold. Features are standardised by the
    training part, a regression's target too; features that do not vary there are 0."""
    x, y = TABLES[table](return_X_y=True)
    kind = KFold if table in REGRESSION else StratifiedKFold
    for training, test in kind(count, shuffle=True, random_state=0).split(x, y):
        mean, std = x[training].mean(0), x[training].std(0)
        features = torch.tensor((x - mean) / np.where(std > 0, std, 1.0), dtype=torch.float32)
        if table in REGRESSION:
            target = torch.tensor((y - y[training].mean()) / y[training].std(), dtype=torch.float32)
        else:
            target = torch.tensor(y)
        yield features[training], target[training], features[test], target[test]


def perceptron(features: int, outputs: int, width: int, depth: int, normalisation: str) -> nn.Sequential:
    """`depth` hidden layers of `width` units with ReLU, normalised before it, and a linear last layer."""
    model = nn.Sequential()
    for layer in range(depth):
        model.add_module(f"hidden{layer + 1}", nn.Linear(features if layer == 0 else width, width))
        if (norm := NORMALISATIONS[normalisation]) is not None:
            model.add_module(f"norm{layer + 1}", norm(width))
        model.add_module(f"relu{layer + 1}", nn.ReLU())
    model.add_module("last", nn.Linear(width, outputs))
    return model


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for classes, the mean squared error for a regression."""
    scores = model(x)
    return F.mse_loss(scores.squeeze(1), y) if y.is_floating_point() else F.cross_entropy(scores, y)


@torch.no_grad()
def score_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy in percent for classes, R² for a regression; NaN where the outputs are not finite."""
    scores = model.eval()(x)
    if not scores.isfinite().all():
        return float("nan")
    if y.is_floating_point():
        return float(r2_score(y.numpy(), scores.squeeze(1).numpy()))
    return 100 * float(accuracy_score(y.numpy(), scores.argmax(1).numpy()))


# --- one condition ----------------------------------------------------------------------------------------


def train(settings: dict[str, Any], kept: Path) -> dict[str, Any]:
    """All folds of one condition on one thread; the result is kept in a file. If it is there already, it is
    read.

    Raises:
        ValueError: what is there was made with other settings.
    """
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["settings"] != settings:
            other = [name for name in settings if result["settings"].get(name) != settings[name]]
            raise ValueError(
                f"{kept} was made with other settings ({', '.join(other)}): remove it, "
                "or give another --output"
            )
        return result
    torch.set_num_threads(1)
    began = time.perf_counter()
    scores, angles = [], []
    for fold, (x, y, test_x, test_y) in enumerate(folds(settings["table"], settings["folds"])):
        torch.manual_seed(fold)
        outputs = 1 if y.is_floating_point() else int(y.max()) + 1
        architecture = (settings[name] for name in ("width", "depth", "normalisation"))
        model = perceptron(x.shape[1], outputs, *architecture)
        if settings["rule"] == LAST_ALONE:
            model.requires_grad_(False).last.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, settings["rate"], fused=True)
        patch = None
        if settings["patch"] is not None:
            patch = feedbackhook.patch(model, **settings["patch"], seed=fold)
        for _ in range(settings["steps"]):
            batch = torch.randperm(len(x))[: settings["batch_size"]]
            optimizer.zero_grad()
            loss_of(model, x[batch], y[batch]).backward()
            optimizer.step()
        scores.append(score_of(model, test_x, test_y))
        if patch is not None:
            angles.append(hidden_gradient_angle(patch, loss_of(model.train(), x, y)))
            patch.remove()  # this process goes on with other models
    seconds = round(time.perf_counter() - began, 2)
    result = {"settings": settings, "scores": scores, "angles": angles, "seconds": seconds}
    with atomic_write(kept) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


def hidden_gradient_angle(patch: feedbackhook.Patch, loss: Tensor) -> float:
    """The mean over hidden layers of the angle to backprop's gradient, in degrees. The last layer's is 0."""
    rows = feedbackhook.measure(patch, loss)
    angles = [row.value for row in rows if row.metric == "gradient_angle" and row.layer not in (None, "last")]
    return float(np.mean(angles))


# --- all conditions ---------------------------------------------------------------------------------------


def summarise(results: list[dict[str, Any]]) -> pd.DataFrame:
    """A row a condition: the mean score and its 95% interval over folds, and the mean gradient angle."""
    names = ("table", "depth", "normalisation", "rule")
    return pd.DataFrame(
        {
            **{name: result["settings"][name] for name in names},
            "measure": "R²" if result["settings"]["table"] in REGRESSION else "accuracy [%]",
            **interval(result["scores"])._asdict(),
            "gradient_angle": np.mean(result["angles"]) if result["angles"] else np.nan,
            **{f"fold {fold}": score for fold, score in enumerate(result["scores"])},
            "seconds": result["seconds"],
        }
        for result in results
    )


def main(
    tables: list[str] = ["breast_cancer", "digits", "diabetes"],  # noqa: B006 - never changed
    depths: list[int] = [2, 5],  # noqa: B006
    normalisations: list[str] = ["none", "LayerNorm"],  # noqa: B006
    rules: list[str] = list(RULES),  # noqa: B006
    width: int = 64,
    rate: float = 3e-3,
    steps: int = 300,
    batch_size: int = 32,
    count: int = 5,
    jobs: int = 2,
    smoke: bool = False,
    output: Path = Path("runs/tabular"),
) -> None:
    """Train, print and draw.

    Args:
        tables: of scikit-learn: breast_cancer, wine, digits, diabetes.
        depths: hidden layers.
        normalisations: before each ReLU: none, LayerNorm, BatchNorm.
        rules: which of the rules in this file, by name.
        width: units of a hidden layer.
        rate: AdamW's learning rate.
        steps: updates.
        batch_size: rows of the table in an update.
        count: folds.
        jobs: processes, each on one thread.
        smoke: a few steps on two tables, to see that it works: seconds.
        output: the folder of the results, the table and the figure.
    """
    console = Console(soft_wrap=True)
    for option, given, known in (
        ("tables", tables, TABLES),
        ("normalisations", normalisations, NORMALISATIONS),
        ("rules", rules, RULES),
    ):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"unknown {option} {unknown}; known: {', '.join(known)}")
    if smoke:
        tables, depths, steps, count, jobs = ["wine", "diabetes"], depths[:1], 10, 2, 1
    output.mkdir(parents=True, exist_ok=True)
    shared = {"width": width, "rate": rate, "steps": steps, "batch_size": batch_size, "folds": count}
    planned = [
        {"table": table, "depth": depth, "normalisation": norm, "rule": rule, "patch": RULES[rule], **shared}
        for table, depth, norm, rule in itertools.product(tables, depths, normalisations, rules)
    ]
    began = time.perf_counter()
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        joblib.delayed(train)(settings, output / file_of(settings)) for settings in planned
    )
    results = list(track(finished, description="training", total=len(planned), console=console))
    conditions = summarise(results)
    for table, part in conditions.groupby("table", sort=False):
        console.print(shown(table, part))
    conditions.to_csv(output / "tabular.csv", index=False, float_format="%.4f")
    draw(conditions).savefig(output / "tabular.png", dpi=150)
    spent = conditions["seconds"].sum()
    console.print(
        f"{time.perf_counter() - began:.0f} s; the {len(conditions)} conditions alone {spent:.0f} s"
    )
    for name in ("tabular.csv", "tabular.png"):
        console.print(output / name)


def file_of(settings: dict[str, Any]) -> str:
    """The name of a condition's file."""
    words = (settings["table"], settings["depth"], settings["normalisation"], settings["rule"])
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, words))) + ".json"


def label(depth: int, normalisation: str) -> str:
    """An architecture in words."""
    return f"{depth} hidden, " + ("no norm" if normalisation == "none" else normalisation)


def shown(name: str, conditions: pd.DataFrame) -> Table:
    """A row a rule, a column an architecture: the mean and half the width of its 95% interval."""
    digits = 3 if name in REGRESSION else 1
    title = f"{name}: test {conditions['measure'].iloc[0]}, mean and 95% interval over folds"
    table = Table(title=title.replace("[", r"\["), box=box.SIMPLE, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    columns = list(conditions.groupby(["depth", "normalisation"], sort=False).groups)
    for depth, norm in columns:
        table.add_column(label(depth, norm).replace(", ", "\n"), justify="right", no_wrap=True)
    for rule, part in conditions.groupby("rule", sort=False):
        cells = part.set_index(["depth", "normalisation"])
        rows = [cells.loc[column] for column in columns]
        table.add_row(
            rule, *(f"{row['mean']:.{digits}f} ± {row['high'] - row['mean']:.{digits}f}" for row in rows)
        )
    return table


def draw(conditions: pd.DataFrame) -> Figure:
    """Scores with their intervals: a panel a table, a place an architecture, a mark a rule."""
    signs = [rule for rule in RULES if rule.startswith("sign")]
    colours = {
        "backprop": theme.look("backprop").color,
        **dict(zip(signs, theme.sequence(len(signs)), strict=True)),
        "random": theme.look("random").color,
        LAST_ALONE: "#222222",
    }
    markers = dict(zip(RULES, "sPDoX^", strict=True))
    names, order = list(conditions["table"].unique()), list(conditions["rule"].unique())
    places = list(conditions.groupby(["depth", "normalisation"], sort=False).groups)
    with theme.style():
        across = len(names) if len(names) <= 3 else 2
        down = -(-len(names) // across)
        figure = Figure(figsize=theme.figsize(5.4 * across, 4.4 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for axes, name in itertools.zip_longest(grid.flat, names):
            if name is None:
                axes.remove()
                continue
            part = conditions[conditions["table"] == name]
            for place, rule in enumerate(order):
                rows = part[part["rule"] == rule].set_index(["depth", "normalisation"]).loc[places]
                shift = (place - (len(order) - 1) / 2) * 0.13
                axes.errorbar(
                    np.arange(len(places)) + shift,
                    rows["mean"],
                    yerr=rows["high"] - rows["mean"],
                    fmt=markers[rule],
                    color=colours[rule],
                    label=rule,
                    capsize=2,
                )
            axes.set_xticks(range(len(places)), [label(*place).replace(", ", "\n") for place in places])
            axes.set(title=name, ylabel=f"test {part['measure'].iloc[0]}")
            axes.grid(visible=False, axis="x")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
