"""The measures, against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

import feedbackhook
from feedbackhook.alignment import angle, norm_ratio, sign_agreement

ANGLES = [
    ([1.0, 0.0], [0.0, 2.0], 90.0),
    ([1.0, 0.0], [3.0, 3.0], 45.0),
    ([1.0, 2.0], [-2.0, -4.0], 180.0),
    ([1.0, 1.0, 0.0], [0.0, 1.0, 1.0], 60.0),
    ([1.0, 0.0], [1.0, 1e-6], math.degrees(1e-6)),
]


@pytest.mark.parametrize(("a", "b", "expected"), ANGLES, ids=str)
def test_angles_in_degrees(a, b, expected):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert angle(a, b) == pytest.approx(expected, rel=1e-9)
    assert angle(b.float(), a.float()) == pytest.approx(expected, rel=1e-4)


def test_the_angle_between_a_tensor_and_itself_is_exactly_zero():
    a = torch.randn(300, 300)
    assert angle(a, a) == 0
    assert angle(a, 2 * a) == pytest.approx(0, abs=1e-4)


def test_the_angle_with_nothing_is_not_a_number():
    assert math.isnan(angle(torch.ones(3), torch.zeros(3)))


def test_sign_agreement_counts_the_entries_that_are_nonzero_in_both():
    v, w = torch.tensor([1.0, -1.0, 2.0, 0.0, 5.0]), torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0])
    assert sign_agreement(v, w) == pytest.approx(2 / 3)
    assert math.isnan(sign_agreement(torch.zeros(3), torch.ones(3)))


def test_norm_ratio():
    assert norm_ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])) == pytest.approx(2.5)


def test_measure_gives_three_metrics_a_layer_in_order():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    given = {"0": -model[0].weight.detach(), "2": 3 * model[2].weight.detach()}
    with feedbackhook.patch(model, "tensor", feedback=given) as patch:
        rows = feedbackhook.measure(patch)
    assert [(row.layer, row.depth, row.metric) for row in rows] == [
        (layer, depth, metric)
        for depth, layer in enumerate(["0", "2"])
        for metric in ("weight_angle", "sign_agreement", "norm_ratio")
    ]
    values = [row.value for row in rows]
    assert values == pytest.approx([180, 0, 1, 0, 1, 3], abs=1e-4)


def test_symmetric_feedback_has_no_angle():
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3))
    with feedbackhook.patch(model, "symmetric") as patch:
        assert [row.value for row in feedbackhook.measure(patch) if row.metric == "weight_angle"] == [0, 0]
