"""One cell of analysis/results/liao2016 again, on the real images: `FEEDBACKHOOK_DATA=FOLDER`."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from support import bounds

import feedbackhook
from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.sweep.grid import plan
from feedbackhook.experiments.training.run import train

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("FEEDBACKHOOK_DATA")
CELL = "MNIST-frSF+BN+BM-concordance=1-rate0.1-seed0"
IMAGES = 10_000  # of the test set


def error_after_an_epoch(folder: Path) -> float:
    """Of the test images, in percent."""
    rows = feedbackhook.read(folder)
    (value,) = rows[(rows["metric"] == "test_error") & (rows["epoch"] == 1)]["value"]
    return float(value)


@pytest.mark.slow
@pytest.mark.skipif(
    DATA is None or not Path(DATA, "MNIST/raw").is_dir(),
    reason="FEEDBACKHOOK_DATA is not a folder that holds MNIST/raw, as torchvision unpacks it",
)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_on_mnist_repeats_the_evidence(seed: int, tmp_path: Path) -> None:
    """The recipe's frSF+BN+BM has the error after its first epoch that the committed run has, which ran on a
    GPU, whatever the seed: within five standard errors of the difference of two rates."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(SweepConfig)
    recipe = ROOT / "recipes/liao2016/evidence/mnist.yaml"
    given = parser.instantiate(parser.parse_args(["--config", str(recipe), "--data.root", str(DATA)]))
    sweep = SweepConfig(**{key: value for key, value in vars(given).items() if key != "config"})
    (config,) = (run.config for run in plan(sweep) if run.name == CELL)
    config = replace(
        config,
        data=replace(config.data, cache=str(tmp_path / "cache")),
        protocol=replace(config.protocol, seed=seed, device="cpu"),
        output=str(tmp_path / "run"),
    )
    assert train(config, until=1).epoch == 1
    committed = error_after_an_epoch(ROOT / "analysis/runs/evidence/mnist" / CELL)
    spread = 100 * math.sqrt(2) * bounds.of_share(committed / 100, IMAGES)
    assert error_after_an_epoch(tmp_path / "run") == pytest.approx(committed, abs=spread)
