"""Which depth, which normalization and how many matching signs does learning on tables need?

Trains multilayer perceptrons on tables from scikit-learn (breast cancer, wine, the 64 features of digits,
and diabetes, a regression) with more and fewer hidden layers, with and without normalization, under backprop,
sign feedback at three concordances, random feedback, and with the last layer trained alone. Measures the test
score of each of five folds (accuracy or R²) and the angle to backprop's gradient at the end.

The folds are fixed: shuffled with seed 0, and stratified by class where there are classes. All conditions
have the same learning rate, which was chosen beforehand. Finished conditions are not repeated; remove the
output folder to start over.

    python recipes/retrofit/tabular.py
    python recipes/retrofit/tabular.py --smoke true --output runs/tabular-smoke
"""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import loop_recipes
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from rich.console import Console
from sklearn.metrics import accuracy_score, r2_score
from tabular_data import TABLES, folds
from tabular_results import LAST_ALONE, draw, shown, summarize
from torch import Tensor, nn

import feedbackhook

RULES: dict[str, dict[str, Any] | None] = {
    **loop_recipes.RULES,
    LAST_ALONE: None,  # not a feedback rule: all other layers keep their initial weights
}
"""Keyword arguments of `feedbackhook.patch` by the rule's name in the tables; None: no patch."""

NORMALIZATIONS = {"none": None, "LayerNorm": nn.LayerNorm, "BatchNorm": nn.BatchNorm1d}


@dataclass(frozen=True)
class Settings:
    """Train, print and draw.

    Args:
        tables: Tables of scikit-learn: breast_cancer, wine, digits, diabetes.
        depths: Numbers of hidden layers.
        normalizations: Normalization before each ReLU: none, LayerNorm, BatchNorm.
        rules: Names of the rules to run, from `RULES` in tabular.py.
        width: Units of each hidden layer.
        lr: AdamW's learning rate.
        steps: Optimizer steps.
        batch_size: Rows of the table per step.
        folds: Number of folds.
        jobs: Number of processes; each uses one thread.
        smoke: Train for a few steps on two tables to check that it works (seconds).
        output: Folder of the results, the table and the figure.
    """

    tables: list[str] = field(default_factory=lambda: ["breast_cancer", "digits", "diabetes"])
    depths: list[int] = field(default_factory=lambda: [2, 5])
    normalizations: list[str] = field(default_factory=lambda: ["none", "LayerNorm"])
    rules: list[str] = field(default_factory=lambda: list(RULES))
    width: int = 64
    lr: float = 3e-3
    steps: int = 300
    batch_size: int = 32
    folds: int = 5
    jobs: int = 2
    smoke: bool = False
    output: Path = Path("runs/tabular")


def perceptron(features: int, outputs: int, width: int, depth: int, normalization: str) -> nn.Sequential:
    """Build `depth` hidden layers with normalization and ReLU, and a linear last layer."""
    model = nn.Sequential()
    for layer in range(depth):
        model.add_module(f"hidden{layer + 1}", nn.Linear(features if layer == 0 else width, width))
        if (norm := NORMALIZATIONS[normalization]) is not None:
            model.add_module(f"norm{layer + 1}", norm(width))
        model.add_module(f"relu{layer + 1}", nn.ReLU())
    model.add_module("last", nn.Linear(width, outputs))
    return model


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy for classes, the mean squared error for a regression."""
    scores = model(x)
    return F.mse_loss(scores.squeeze(1), y) if y.is_floating_point() else F.cross_entropy(scores, y)


@torch.no_grad()
def score_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in percent for classes, R² for a regression; NaN if an output is not finite."""
    scores = model.eval()(x)
    if not scores.isfinite().all():
        return float("nan")
    if y.is_floating_point():
        return float(r2_score(y.numpy(), scores.squeeze(1).numpy()))
    return 100 * float(accuracy_score(y.numpy(), scores.argmax(1).numpy()))


def train(settings: dict[str, Any], file: Path) -> loop_recipes.Result:
    """Train all folds of a condition on one thread, or return the finished result in `file`.

    Raises:
        ValueError: The result in `file` was made with other settings.
    """
    return loop_recipes.run_once(file, settings, lambda: _train_folds(settings))


def _train_folds(settings: dict[str, Any]) -> loop_recipes.Result:
    scores, angles = [], []
    for fold, (x, y, test_x, test_y) in enumerate(folds(settings["table"], settings["folds"])):
        torch.manual_seed(fold)
        outputs = 1 if y.is_floating_point() else int(y.max()) + 1
        architecture = (settings[name] for name in ("width", "depth", "normalization"))
        model = perceptron(x.shape[1], outputs, *architecture)
        if settings["rule"] == LAST_ALONE:
            model.requires_grad_(False).last.requires_grad_(True)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, settings["lr"], fused=True)
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
            patch.remove()
    return {"scores": scores, "angles": angles}


def hidden_gradient_angle(patch: feedbackhook.Patch, loss: Tensor) -> float:
    """Return the mean angle of the hidden layers to backprop's gradient, in degrees."""
    rows = feedbackhook.measure(patch, loss)
    angles = [row.value for row in rows if row.metric == "gradient_angle" and row.layer not in (None, "last")]
    return float(np.mean(angles))


def main(settings: Settings) -> None:
    """Train, print and draw."""
    console = Console(soft_wrap=True)
    loop_recipes.check_names("tables", settings.tables, TABLES)
    loop_recipes.check_names("normalizations", settings.normalizations, NORMALIZATIONS)
    loop_recipes.check_names("rules", settings.rules, RULES)
    if settings.smoke:
        small = {"tables": ["wine", "diabetes"], "depths": settings.depths[:1]}
        settings = replace(settings, **small, steps=10, folds=2, jobs=1)
    output = settings.output
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    calls = [(condition, output / file_of(condition)) for condition in planned(settings)]
    results = loop_recipes.run_in_processes(train, calls, settings.jobs, "training", console)
    conditions = summarize(results)
    for table, part in conditions.groupby("table", sort=False):
        console.print(shown(table, part))
    conditions.to_csv(output / "tabular.csv", index=False, float_format="%.4f")
    draw(conditions).savefig(output / "tabular.png", dpi=150)
    spent = conditions["seconds"].sum()
    console.print(
        f"{time.perf_counter() - began:.0f} s; sum over {len(conditions)} conditions: {spent:.0f} s"
    )
    console.print(output / "tabular.csv", output / "tabular.png", sep="\n")


def planned(settings: Settings) -> list[dict[str, Any]]:
    """Return the settings of each condition."""
    shared = {name: getattr(settings, name) for name in ("width", "lr", "steps", "batch_size", "folds")}
    product = itertools.product(settings.tables, settings.depths, settings.normalizations, settings.rules)
    return [
        {"table": table, "depth": depth, "normalization": norm, "rule": rule, "patch": RULES[rule], **shared}
        for table, depth, norm, rule in product
    ]


def file_of(condition: dict[str, Any]) -> str:
    """Return the name of a condition's file."""
    words = (condition[name] for name in ("table", "depth", "normalization", "rule"))
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, words))) + ".json"


if __name__ == "__main__":
    config = str(Path(__file__).with_suffix(".yaml"))
    main(auto_cli(Settings, as_positional=False, default_config_files=[config]))
