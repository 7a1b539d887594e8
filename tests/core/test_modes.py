"""`mode` as a mapping from layers to rules."""

import pytest
import torch
from support.oracle import assert_matches_oracle, gradients
from support.problems import draw, mlp
from torch import nn

import feedbackhook


def rules(model, mode, **selection):
    with feedbackhook.patch(model, mode, **selection) as patch:
        return {row.name: row.rule for row in patch.layers}


MAPPINGS = [
    ({"0": "uSF"}, {"0": "uSF"}),
    (
        {"[02]": "uSF", "4": {"mode": "sign", "concordance": 0.7}},
        {"0": "uSF", "2": "uSF", "4": "sign(concordance=0.7)"},
    ),
    ({"0": "uSF", ".*": "symmetric"}, {"0": "uSF", "2": "symmetric", "4": "symmetric"}),
    ({".*": "symmetric", "0": "uSF"}, {"0": "symmetric", "2": "symmetric", "4": "symmetric"}),
]


@pytest.mark.parametrize(("mode", "expected"), MAPPINGS, ids=str)
def test_the_first_match_wins_and_what_nothing_matches_stays_exact(mode, expected):
    assert rules(mlp(), mode) == expected


def test_exclude_wins_over_the_mapping():
    assert rules(mlp(), {".*": "uSF"}, exclude=["2"]) == {"0": "uSF", "4": "uSF"}


def test_each_layer_follows_its_own_rule_and_the_rest_is_backprop():
    plain, model, x = mlp(), mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, {"2": "NuSF", "4": {"mode": "symmetric"}})
    sign = torch.sign(plain[2].weight.detach())
    feedback = {"2": sign / plain[2].in_features}
    assert_matches_oracle(gradients(model, x), plain, feedback, x, unlike=["0.weight"])
    assert {row.name: row.rerouted for row in patch.layers} == {"2": 1, "4": 1}


def test_given_tensors_for_some_layers():
    model = mlp()
    v = torch.ones_like(model[2].weight)
    with feedbackhook.patch(model, {"2": {"mode": "tensor", "feedback": {"2": v}}, "4": "uSF"}) as patch:
        assert torch.equal(patch.feedback("2"), v)


def test_options_change_where_the_rule_has_them():
    with feedbackhook.patch(mlp(), {"0": "symmetric", "2": "sign", "4": "frSF"}) as patch:
        patch.set(concordance=0.25)
        assert [row.rule for row in patch.layers] == [
            "symmetric",
            "sign(concordance=0.25)",
            "frSF(concordance=0.25)",
        ]
        patch.set(scale=None)
        assert [row.rule for row in patch.layers][1] == "sign(concordance=0.25, scale=None)"
        with pytest.raises(TypeError, match="mode 'symmetric' has no option 'std'"):
            patch.set(std=1)


def test_state_keeps_each_layers_rule():
    patch, other = (
        feedbackhook.patch(mlp(), {"0": "uSF", "2": "frSF"}),
        feedbackhook.patch(mlp(), include="[02]"),
    )
    other.load_state_dict(patch.state_dict())
    assert [row.rule for row in other.layers] == ["uSF", "frSF"]


REFUSED = [
    ({}, ValueError, "the mapping of modes is empty"),
    ({"nothing": "uSF"}, ValueError, "mode: 'nothing' matches no layer; similar names: "),
    ({"0": "sgn"}, ValueError, "unknown mode 'sgn'; known: symmetric"),
    ({"0": {"concordance": 1}}, TypeError, r"mode\['0'\] lacks the key 'mode'"),
    ({"0": {"mode": "uSF", "concordance": 1}}, TypeError, "mode 'uSF' has no option 'concordance'"),
    ({"0": 3}, TypeError, r"mode\['0'\] must be a mode or a dict of mode and options, not 3"),
    ({"(": "uSF"}, ValueError, r"mode='\(' is not a regular expression"),
]


@pytest.mark.parametrize(("mode", "error", "message"), REFUSED, ids=str)
def test_bad_mappings_are_refused_and_leave_the_model_alone(mode, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        feedbackhook.patch(model, mode)
    assert feedbackhook.get_patch(model) is None
    assert not any(isinstance(m, nn.Module) and m._forward_hooks for m in model.modules())


def test_options_beside_a_mapping_are_refused():
    with pytest.raises(
        TypeError, match=r"options next to a mapping of modes \(concordance\) belong to no rule"
    ):
        feedbackhook.patch(mlp(), {"0": "sign"}, concordance=0.5)


def test_a_weight_shared_with_a_layer_that_nothing_matches_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share a weight; patch both or exclude both"):
        feedbackhook.patch(model, {"0": "uSF"})


def test_a_recurrent_layer_that_nothing_matches_stays_exact():
    with feedbackhook.patch(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), {"0": "uSF"}) as patch:
        assert [row.name for row in patch.layers] == ["0"]
