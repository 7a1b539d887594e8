"""The page with the rules that learn says what the committed runs show."""

from __future__ import annotations

import math
import re
import shlex
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from feedbackhook.core.learning import learns
from feedbackhook.experiments.config import ModelConfig
from feedbackhook.experiments.models.build import build
from feedbackhook.rules import RULES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "analysis"))
import learned_rules  # noqa: E402
from evidence import NotBorneOut  # noqa: E402

RESULTS = ROOT / "analysis/results/rules/learned"
RUNS = ROOT / "analysis/runs/rules/learned"
RECIPE = ROOT / "recipes/rules/learned.yaml"
SWEEPS = list(learned_rules.SOURCES)
NETWORKS = {"digits": ("mnist", 1, 28), "mnist": ("mnist", 1, 28), "cifar10": ("cifar", 3, 32)}


def recipes() -> dict[str, dict[str, Any]]:
    """Return the configuration of each command in the recipe's head, by the name of its folder of runs."""
    text = RECIPE.read_text()
    commands = re.findall(r"feedbackhook sweep recipes/rules/learned\.yaml(.*)", re.sub(r"\\\n#", "", text))
    found = {}
    for command in commands:
        config = yaml.safe_load(text)
        words = shlex.split(command)
        for option, value in zip(words[::2], words[1::2], strict=True):
            *sections, key = option.removeprefix("--").split(".")
            reduce(lambda part, section: part.setdefault(section, {}), sections, config)[key] = (
                yaml.safe_load(value)
            )
        found[Path(config["output"]).name] = config
    return found


@pytest.fixture(scope="module")
def evidence() -> learned_rules.Evidence:
    return learned_rules.read(RUNS / "digits", learned_rules.SOURCES["digits"])


def test_the_page_and_its_tables_are_those_of_the_runs(tmp_path: Path) -> None:
    learned_rules.main(output=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    figures = {f"weight_angle_{sweep}.png" for sweep in SWEEPS}
    assert names == {"README.md", "cells.csv", "runs.csv", *figures}
    assert names == {path.name for path in RESULTS.iterdir()}
    for name in names - figures:
        assert (RESULTS / name).read_text() == (tmp_path / name).read_text(), name


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_runs_are_those_of_the_recipe(sweep: str) -> None:
    swept, recipe = yaml.safe_load((RUNS / sweep / "sweep.yaml").read_text()), recipes()[sweep]
    assert swept["conditions"] == recipe["conditions"]
    for section in ("optimizer", "protocol", "record"):
        assert recipe[section].items() <= swept[section].items()
    assert swept["data"]["train_images"] == recipe["data"].get("train_images")


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_numbers_of_the_page_are_those_of_the_recipe(sweep: str) -> None:
    recipe, source = recipes()[sweep], learned_rules.SOURCES[sweep]
    protocol, optimizer, conditions = (recipe[key] for key in ("protocol", "optimizer", "conditions"))
    assert list(conditions) == list(learned_rules.ORDER)
    of_protocol = (source.epochs, source.batch, [source.milestone])
    assert (protocol["epochs"], protocol["batch_size"], protocol["milestones"]) == of_protocol
    of_optimizer = (learned_rules.LR, learned_rules.MOMENTUM, source.decay)
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == of_optimizer
    assert recipe["record"]["every"] <= source.per_epoch
    assert recipe["data"].get("train_images", source.training) == source.training
    assert conditions["PFA"]["feedback"]["options"] == {"expansion": learned_rules.EXPANSION}


def test_the_page_has_every_rule_that_learns() -> None:
    own = {name: rule for name, rule in RULES.items() if rule.__module__.startswith("feedbackhook.")}
    assert {name for name, rule in own.items() if learns(rule)} == set(learned_rules.LEARNED)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_layers_have_the_inputs_that_the_formulas_take(sweep: str) -> None:
    network, channels, pixels = NETWORKS[sweep]
    model = build(ModelConfig(name=f"liao2016/{network}"), 10, channels, (pixels, pixels))
    inputs = {
        name.removesuffix(".weight"): weight[0].numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1
    }
    layers = learned_rules.SOURCES[sweep].layers
    assert dict(list(inputs.items())[1:]) == layers


@pytest.mark.parametrize("sweep", SWEEPS)
def test_what_is_left_of_the_difference_is_what_sgd_leaves_of_a_weight_without_gradient(sweep: str) -> None:
    source = learned_rules.SOURCES[sweep]
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(
        [weight], lr=learned_rules.LR, momentum=learned_rules.MOMENTUM, weight_decay=source.decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [source.milestone], 0.1)
    for _ in range(source.epochs):
        for _ in range(source.per_epoch):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        schedule.step()
    assert learned_rules.remaining(source.steps, source) == pytest.approx(weight.item(), rel=1e-9)


def test_an_angle_and_two_norms_give_the_norm_of_the_difference() -> None:
    """W = (3, 0), and V = (3, 4), later (3, 1): angle arctan(4 / 3) and arctan(1 / 3), ratio 5 / 3 and
    sqrt(10) / 3. The difference shrinks from 4 to 1."""
    rows = []
    for step, other in ((0, 4.0), (19, 1.0)):
        angle, ratio = math.degrees(math.atan2(other, 3)), math.hypot(3, other) / 3
        for metric, value in (("weight_angle", angle), ("norm_ratio", ratio), ("weight_norm", 3.0)):
            rows.append({"run": "a", "step": step, "layer": "fc2", "metric": metric, "value": value})
    source = learned_rules.SOURCES["digits"]
    shrinking = learned_rules.shrinking(pd.DataFrame(rows), ["a"], source)
    assert shrinking["measured"].tolist() == pytest.approx([1, 0.25])
    assert shrinking["predicted"].tolist() == [1, learned_rules.remaining(19, source)]


def test_a_sentence_that_the_runs_do_not_bear_out_stops_the_page(evidence: learned_rules.Evidence) -> None:
    cells = evidence.cells.copy()
    cells.loc[cells["condition"] == "KP", "weight_angle fc2"] = 6.0
    with pytest.raises(NotBorneOut, match="below 5 degrees"):
        learned_rules.page({"digits": learned_rules.Results(replace(evidence, cells=cells))})


def test_a_cell_with_a_missing_run_is_compared_with_nothing_and_counted(
    evidence: learned_rules.Evidence,
) -> None:
    cells = evidence.cells.copy()
    cells.loc[cells["condition"] == "FA", "ended"] = 2
    results = learned_rules.Results(replace(evidence, cells=cells))
    assert results.missing() == learned_rules.Results(evidence).missing() + 1
    assert not results.known("FA")
    assert "FA" not in [*results.against_backprop(True), *results.against_backprop(False)]
    assert results.better_than("FA") == []
