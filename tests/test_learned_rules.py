"""The page with the rules that learn says what the committed runs show."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

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
RECIPE = yaml.safe_load((ROOT / "recipes/rules/learned.yaml").read_text())


@pytest.fixture(scope="module")
def evidence() -> learned_rules.Evidence:
    return learned_rules.read(RUNS)


def test_the_page_and_its_tables_are_those_of_the_runs(tmp_path: Path) -> None:
    learned_rules.main(output=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "cells.csv", "runs.csv", "weight_angle.png"}
    assert names == {path.name for path in RESULTS.iterdir()}
    for name in names - {"weight_angle.png"}:
        assert (RESULTS / name).read_text() == (tmp_path / name).read_text(), name


def test_the_runs_are_those_of_the_recipe() -> None:
    swept = yaml.safe_load((RUNS / "sweep.yaml").read_text())
    assert swept["conditions"] == RECIPE["conditions"]
    for section in ("optimizer", "protocol", "record"):
        assert RECIPE[section].items() <= swept[section].items()


def test_the_numbers_of_the_page_are_those_of_the_recipe() -> None:
    protocol, optimizer, conditions = (RECIPE[key] for key in ("protocol", "optimizer", "conditions"))
    assert list(conditions) == list(learned_rules.ORDER)
    assert (protocol["epochs"], protocol["batch_size"], protocol["milestones"]) == (
        learned_rules.SOURCE.epochs,
        learned_rules.BATCH,
        [learned_rules.MILESTONE],
    )
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (
        learned_rules.LR,
        learned_rules.MOMENTUM,
        learned_rules.DECAY,
    )
    assert conditions["PFA"]["feedback"]["options"] == {"expansion": learned_rules.EXPANSION}


def test_the_page_has_every_rule_that_learns() -> None:
    own = {name: rule for name, rule in RULES.items() if rule.__module__.startswith("feedbackhook.")}
    assert {name for name, rule in own.items() if learns(rule)} == set(learned_rules.LEARNED)


def test_the_layers_have_the_inputs_that_the_formulas_take() -> None:
    network = build(ModelConfig(name="liao2016/mnist"), 10, 1, (28, 28))
    inputs = {
        name.removesuffix(".weight"): weight[0].numel()
        for name, weight in network.named_parameters()
        if weight.ndim > 1
    }
    assert {name: inputs[name] for name in learned_rules.LAYERS} == learned_rules.LAYERS
    assert list(inputs)[1:] == list(learned_rules.LAYERS)


def test_what_is_left_of_the_difference_is_what_sgd_leaves_of_a_weight_without_gradient() -> None:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(
        [weight], lr=learned_rules.LR, momentum=learned_rules.MOMENTUM, weight_decay=learned_rules.DECAY
    )
    per_epoch = learned_rules.SOURCE.training // learned_rules.BATCH
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [learned_rules.MILESTONE], 0.1)
    for _ in range(learned_rules.SOURCE.epochs):
        for _ in range(per_epoch):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        schedule.step()
    steps = learned_rules.SOURCE.epochs * per_epoch
    assert learned_rules.remaining(steps) == pytest.approx(weight.item(), rel=1e-9)


def test_an_angle_and_two_norms_give_the_norm_of_the_difference() -> None:
    """W = (3, 0), and V = (3, 4), later (3, 1): angle arctan(4 / 3) and arctan(1 / 3), ratio 5 / 3 and
    sqrt(10) / 3. The difference shrinks from 4 to 1."""
    rows = []
    for step, other in ((0, 4.0), (19, 1.0)):
        angle, ratio = math.degrees(math.atan2(other, 3)), math.hypot(3, other) / 3
        for metric, value in (("weight_angle", angle), ("norm_ratio", ratio), ("weight_norm", 3.0)):
            rows.append({"run": "a", "step": step, "layer": "fc2", "metric": metric, "value": value})
    shrinking = learned_rules.shrinking(pd.DataFrame(rows), ["a"])
    assert shrinking["measured"].tolist() == pytest.approx([1, 0.25])
    assert shrinking["predicted"].tolist() == [1, learned_rules.remaining(19)]


def test_a_sentence_that_the_runs_do_not_bear_out_stops_the_page(evidence: learned_rules.Evidence) -> None:
    cells = evidence.cells.copy()
    cells.loc[cells["condition"] == "KP", "weight_angle fc2"] = 6.0
    with pytest.raises(NotBorneOut, match="below 5 degrees"):
        learned_rules.page(learned_rules.Results(replace(evidence, cells=cells)))


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
