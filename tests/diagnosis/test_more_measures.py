"""What `measure` returns on request, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support import bounds
from support.diagnosis import batches, loss, net
from support.problems import Net, draw, redrawn
from torch import nn

import feedbackhook
from feedbackhook.measurement import ALSO
from feedbackhook.ranks import participation_ratio

CLOSE = {"rel": bounds.HALF_OF_FLOAT64, "abs": bounds.HALF_OF_FLOAT64}


def measured(patch, value, also):
    return {(row.layer, row.metric): row.value for row in feedbackhook.measure(patch, value, also=also)}


def test_cosines_are_those_of_the_angles_and_of_the_trace():
    model, ((x, y),) = net(), batches(1)
    with feedbackhook.patch(model, "random") as patch:
        rows = measured(patch, loss(model(x), y), ALSO)
        v, w = patch.feedback("2"), model[2].weight.detach()
        alone = {row.metric for row in feedbackhook.measure(patch, also=["weight_cosine"])}
    trace = float((v.T @ w).trace() / v.norm() / w.norm())
    assert rows["2", "weight_cosine"] == pytest.approx(trace, **CLOSE)
    for layer in ("2", "4", None):
        for kind in ("weight", "gradient") if layer is None else ("weight", "error", "gradient"):
            angle = rows[layer, f"{kind}_angle"]
            assert rows[layer, f"{kind}_cosine"] == pytest.approx(math.cos(math.radians(angle)), **CLOSE)
    assert math.isnan(rows["0", "error_cosine"])
    assert "weight_cosine" in alone


def test_participation_ratios_by_hand():
    model, ((x, y),) = net(), batches(1)
    with feedbackhook.patch(model, "random") as patch:
        rows = measured(patch, loss(model(x), y), ["participation_ratio", "exact_participation_ratio"])
        v, w = patch.feedback("4"), model[4].weight.detach()
    error = 2 * (model(x) - y).detach() / y.numel()
    hidden = model[:4](x).detach()

    def ratio(signals):
        values = torch.linalg.svdvals(signals) ** 2
        return float(values.sum() ** 2 / (values**2).sum())

    for name, matrix in (("participation_ratio", v), ("exact_participation_ratio", w)):
        assert rows["4", name] == pytest.approx(ratio(error), **CLOSE)
        assert rows["2", name] == pytest.approx(ratio(error @ matrix * (1 - hidden**2)), **CLOSE)
    assert rows["2", "participation_ratio"] != pytest.approx(rows["2", "exact_participation_ratio"])
    assert (None, "participation_ratio") not in rows


def test_of_a_convolution_channels_are_the_features():
    model = redrawn(Net())
    with feedbackhook.patch(model, "symmetric") as patch:
        seen = {}
        conv = next(row.name for row in patch.layers if row.kind == "Conv2d")
        value = model(draw(2, 2, 6, 6)).square().sum()
        rows = measured(patch, value, ["participation_ratio"])
        patch.on_error_signal(conv, lambda grad_input, grad_output: seen.update(signal=grad_output))
        value.backward()
    signals = seen["signal"].movedim(1, -1).flatten(0, -2)
    values = torch.linalg.svdvals(signals) ** 2
    want = float(values.sum() ** 2 / (values**2).sum())
    assert rows[conv, "participation_ratio"] == pytest.approx(want, **CLOSE)
    assert seen["signal"].shape[1] == model.get_submodule(conv).out_channels


def test_the_ratio_is_1_on_a_line_and_the_dimension_if_all_are_equal():
    line = draw(9, 1) * draw(1, 4)
    assert participation_ratio(line.T @ line) == pytest.approx(1)
    assert participation_ratio(3 * torch.eye(4)) == pytest.approx(4)
    assert math.isnan(participation_ratio(torch.zeros(3, 3)))


@pytest.mark.parametrize(
    ("also", "with_loss", "message"),
    [
        (["weight_cosin"], True, "did you mean 'weight_cosine'"),
        ("weight_cosine", True, r"a list of metrics, such as \['weight_cosine'\]"),
        (["gradient_cosine"], False, "needs a loss"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(also, with_loss, message):
    model, ((x, y),) = net(), batches(1)
    with feedbackhook.patch(model, "random") as patch, pytest.raises(ValueError, match=message):
        feedbackhook.measure(patch, loss(model(x), y) if with_loss else None, also=also)


def test_no_probe_is_left():
    model, ((x, y),) = nn.Sequential(net()), batches(1)
    with feedbackhook.patch(model, "random") as patch:
        feedbackhook.measure(patch, loss(model(x), y), also=ALSO)
        assert not any(layer.probes for layer in patch.state.layers)
