"""Controls: the classifier alone, and the body frozen as drawn, as rows of a sweep."""

from __future__ import annotations

import pandas as pd
import pytest

from feedbackhook.experiments.config import (
    ModelConfig,
    SweepConfig,
    SweepModelConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.sweep.controls import ALONE, BOTH, DRAWN, is_control
from feedbackhook.experiments.sweep.grid import plan
from feedbackhook.experiments.sweep.manifest import describe
from feedbackhook.report.aggregate import mark_controls
from feedbackhook.report.tables import NOT_BETTER


def sweep(conditions, controls=True, weights=None) -> SweepConfig:
    return SweepConfig(
        conditions,
        ["digits"],
        model=SweepModelConfig("timm/test_efficientnet", weights=weights, trainable=r"blocks.*"),
        protocol=SweepProtocolConfig(lr_factors=1, seeds=1),
        controls=controls,
    )


OWN = {
    "plain": {"feedback": {"mode": None}, "optimizer": {"lr": 0.03, "name": "sgd"}},
    "random": {"feedback": {"mode": "random"}},
}


@pytest.mark.parametrize("conditions", [["SGD", "uSF+BN+BM"], OWN], ids=["names", "own"])
def test_without_weights_both_controls_are_one_row_by_the_settings_of_the_reference(conditions):
    runs = plan(sweep(conditions))
    assert [run.condition for run in runs] == [*conditions, BOTH]
    control, reference = runs[-1].resolved, runs[0].resolved
    assert control.model.frozen == "Top"
    assert control.feedback.mode is None
    assert control.optimizer == reference.optimizer
    assert control.protocol == reference.protocol
    assert control.label == BOTH
    assert control.model.trainable is None
    planned = describe(sweep(conditions), runs)
    assert [name for name, given in planned.conditions.items() if given.control] == [BOTH]
    assert plan(sweep(conditions, controls=False))[-1].condition == list(conditions)[-1]


def test_with_weights_the_second_control_has_a_body_as_drawn():
    runs = {run.condition: run.config for run in plan(sweep(OWN, weights="model.safetensors"))}
    assert list(runs) == [*OWN, ALONE, DRAWN]
    assert runs[ALONE].model.weights == "model.safetensors"
    assert runs[DRAWN].model == ModelConfig("timm/test_efficientnet", frozen="Top")
    assert is_control(ALONE)
    assert not is_control("SGD")


def test_a_condition_that_is_not_better_than_every_control_is_marked():
    cells = pd.DataFrame(
        {
            "dataset": ["a"] * 4 + ["b"] * 2,
            "condition": ["SGD", "weak", "even", BOTH, "SGD", "weak"],
            "best_error": [10.0, 31.0, 30.0, 30.0, 5.0, 50.0],
        }
    )
    marked = mark_controls(cells, {BOTH})
    assert marked["control"].tolist() == [False, False, False, True, False, False]
    # there is no control on b, so that nothing can be said
    assert marked["not_better"].tolist() == [False, True, True, False, False, False]
    assert NOT_BETTER.strip()
