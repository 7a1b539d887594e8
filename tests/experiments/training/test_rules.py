"""Every rule from the command line: `inspect`, `train` and a sweep on a tiny network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.rules import EVERY_RULE, INEXACT
from support.sweeps import tiny

from feedbackhook.cli import main
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.experiments.training.run import train
from feedbackhook.report import rules as reported
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.rules import expected_angle, make_rule, rule_values
from feedbackhook.store.recorder import read

NETWORK = "timm/test_resnet"
NOT_TERMS = {"symmetric", "sign", "random"}  # rules of the library that no condition of the paper has
CONDITIONS = [
    *(mode for mode in INEXACT if mode not in NOT_TERMS),
    *("angle+BM degrees=30", "svd power=-1 rank=2", "FA init=kaiming_normal Top"),
]


@pytest.mark.parametrize("mode", EVERY_RULE)
def test_a_rule_is_inspected_and_trained(
    mode: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--options.{key}={value}" for key, value in EVERY_RULE[mode].items()]
    assert main(["inspect", NETWORK, "--mode", mode, "--size", "32", *given, "--json"]) == 0
    layers = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    patched = {name for name, row in layers.items() if row["rule"] is not None}
    assert {layers[name]["rule"].partition("(")[0] for name in patched} == {mode}
    assert layers.keys() - patched == ({"fc"} if mode == "sign-symmetry" else set())

    config.protocol.epochs = 1
    config = replace(
        config, model=ModelConfig(NETWORK), feedback=FeedbackConfig(mode, dict(EVERY_RULE[mode]))
    )
    assert train(config).status == "finished"
    table = read(str(config.output))
    angles = table[table["metric"] == "weight_angle"]
    assert set(angles["layer"].dropna()) == patched
    assert angles["value"].notna().all()
    known = expected_angle(make_rule(mode, EVERY_RULE[mode]), torch.ones(2, 3)) is not None
    assert (set(table.loc[table["metric"] == "expected_weight_angle", "layer"]) == patched) == known


def test_a_rule_follows_a_schedule_and_excludes_nothing_if_told(config: RunConfig) -> None:
    feedback = FeedbackConfig("angle", {"degrees": 90}, schedule={2: {"degrees": 30}})
    config = replace(config, model=ModelConfig(NETWORK), feedback=feedback)
    train(config)
    table = read(str(config.output))
    angles = table[(table["metric"] == "weight_angle") & table["layer"].notna()]
    assert angles[angles["epoch"] < 2]["value"].to_numpy() == pytest.approx(90, abs=1e-2)
    assert angles[angles["epoch"] == 4]["value"].to_numpy() == pytest.approx(30, abs=1e-2)
    whole = FeedbackConfig("sign-symmetry", exclude=[])
    config = replace(config, feedback=whole, output=f"{config.output}-whole")
    train(config)
    assert "fc" in set(read(str(config.output))["layer"])


def test_a_sweep_of_every_rule_has_its_table(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        conditions=["SGD", *CONDITIONS],
        data=DataConfig(size=16, val_fraction=0.1, train_images=200, test_images=100),
        protocol=SweepProtocolConfig(1, lr_factors=1),
        workers=1,
    )
    results = sweep(config)
    assert {result.status for result in results.values()} <= {"finished", "diverged"}
    table = sweep_table(tmp_path)
    assert not table.missing
    assert list(table.cells["condition"]) == ["SGD", *CONDITIONS]
    assert table.cells["best_error"].between(0, 100).all()
    for name, condition in table.manifest.conditions.items():
        parsed = Condition.parse(name)
        assert condition.rule == parsed.feedback
        has = {} if parsed.feedback is None else rule_values(make_rule(parsed.feedback, dict(parsed.options)))
        assert condition.concordance == has.get("concordance")
        assert reported.concordance(condition.rule, dict(parsed.options)) == has.get("concordance")


@pytest.mark.parametrize("condition", ["DFA", "sDFA shared=True", "DRTP", "DFA+BM scale=kaiming", "DKP"])
def test_a_direct_rule_is_a_condition_and_trains(condition: str, config: RunConfig) -> None:
    """DRTP is given its targets, which its error does not show once the network is sure of a sample."""
    config = replace(config, condition=condition, model=ModelConfig(NETWORK), feedback=FeedbackConfig())
    config = replace(config, optimizer=OptimizerConfig(lr=0.05 if "BM" not in condition else 1e-3))
    config.protocol.epochs = 2
    assert Condition.parse(condition).name == condition
    assert train(config).status == "finished"
    table = read(str(config.output))
    errors = table[(table["metric"] == "error_angle") & table["layer"].notna()]
    assert errors["value"].between(0, 180).any()
    assert table.loc[table["metric"] == "weight_angle", "value"].isna().all()  # they have no V


def test_what_the_feedback_learns_may_have_its_own_rate_and_be_frozen(config: RunConfig) -> None:
    """V moves at the second rate, and stays from the end of the first epoch on."""
    feedback = FeedbackConfig("symmetric-alignment", lr=0.5, schedule={1: {"mode": "frozen"}})
    config = replace(config, model=ModelConfig(NETWORK), feedback=feedback)
    config = replace(config, optimizer=OptimizerConfig("sgd", lr=1e-4, momentum=0.0))
    config.protocol.epochs = 2
    assert train(config).status == "finished"
    saved = torch.load(Path(str(config.output)) / "checkpoint.pt")
    assert {row["mode"] for row in saved["patch"]["layers"].values()} == {"tensor"}
    of_weights, of_learned = (group["lr"] for group in saved["optimizer"]["param_groups"])
    assert of_learned / of_weights == pytest.approx(5000)
    table = read(str(config.output))
    angles = table[(table["metric"] == "weight_angle") & (table["layer"] == "fc")]
    assert angles["value"].iloc[-1] < 45 < angles["value"].iloc[0]


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        (FeedbackConfig("sign", lr=0.1), "feedback.lr has no effect"),
        (FeedbackConfig("KP", mirror=10), "no layer follows a rule with a mirror phase"),
    ],
    ids=["a rate", "a mirror phase"],
)
def test_options_for_rules_that_learn_are_refused_for_others(
    config: RunConfig, feedback: FeedbackConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(replace(config, model=ModelConfig(NETWORK), feedback=feedback))
