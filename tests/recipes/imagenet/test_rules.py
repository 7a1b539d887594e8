"""The rules of the ImageNet recipe against their formulas and the oracle."""

import copy
import inspect
import math

import pytest
import torch
import torchvision
import yaml
from support.bounds import ROUNDING, of_mean, of_std
from support.imagenet import SCRIPT, assert_same_state, build
from support.oracle import (
    ORACLES,
    TOLERANCE,
    assert_matches_oracle,
    assert_unlike,
    by_backprop,
    distances,
    gradients,
)
from torch import nn

import feedbackhook

LAYERS = {
    "linear": (nn.Linear(12, 7), 1 / math.sqrt(12)),
    "conv": (nn.Conv2d(3, 10, (5, 2)), math.sqrt(2 / (5 * 2 * 10))),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), math.sqrt(2 / (3 * 3 * 8))),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), math.sqrt(2 / (3 * 3 * 4))),
    "conv1d": (nn.Conv1d(2, 5, 3), math.sqrt(2 / (3 * 5))),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_v_of_sign_symmetry_is_the_formula_and_follows_w(recipe, kind):
    layer, s = copy.deepcopy(LAYERS[kind])
    patch = feedbackhook.patch(nn.Sequential(layer), "sign-symmetry", exclude=[])
    for _ in range(2):
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight)).view(-1)[0] = 0
        w = layer.weight.detach()
        want = torch.where(w > 0, s, torch.where(w < 0, -s, 0.0))
        once_each = 2 * ROUNDING["float32"]  # s is rounded to float32 on either side
        torch.testing.assert_close(patch.feedback("0"), want, rtol=once_each, atol=0)
        assert (patch.feedback("0") == 0).sum() == 1


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_v_of_feedback_alignment_has_the_scale_and_stays(recipe, kind):
    small, _ = LAYERS[kind]
    if kind == "linear":
        layer, s = nn.Linear(400, 300), 1 / math.sqrt(400)
    else:
        layer = nn.Conv2d(100, 90, small.kernel_size, groups=small.groups)
        s = math.sqrt(2 / (math.prod(small.kernel_size) * 90))
    patch = feedbackhook.patch(nn.Sequential(layer), "feedback-alignment")
    v = patch.feedback("0")
    std = s / math.sqrt(3) if kind == "linear" else s  # of U[-s, s] and of N(0, s^2)
    assert v.std().item() == pytest.approx(std, rel=of_std(v.numel()))
    assert abs(v.mean().item()) < of_mean(std, v.numel())
    assert (v.abs().max() <= s) == (kind == "linear")
    correlation = torch.corrcoef(torch.stack([v.flatten(), layer.weight.detach().flatten()]))[0, 1]
    assert abs(correlation) < of_mean(1, v.numel())  # 1 / sqrt(n) is its standard error
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(patch.feedback("0"), v)


def test_a_layer_without_a_published_scale_is_refused(recipe):
    with pytest.raises(ValueError, match=r"'0' is a ConvTranspose2d, .* exclude it"):
        feedbackhook.patch(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)), "feedback-alignment")


@pytest.mark.parametrize("rule", ["sign-symmetry", "feedback-alignment"])
def test_gradients_are_the_oracles_and_the_last_layer_is_exact(recipe, rule):
    network, patch = build(recipe, 7, rule=rule, seed=3)
    network.double()
    feedback = {row.name: patch.feedback(row.name) for row in patch.layers}
    convolutions = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    assert list(feedback) == convolutions  # so the oracle leaves the linear layer exact
    if rule == "sign-symmetry":
        for name in convolutions:
            w = network.get_submodule(name).weight.detach()
            s = math.sqrt(2 / (w.shape[2] * w.shape[3] * w.shape[0]))
            of_s = 4 * ROUNDING["float64"]  # the quotient and its root, on either side
            torch.testing.assert_close(feedback[name], s * w.sign(), rtol=of_s, atol=0)
    plain = torchvision.models.resnet18(weights=None, num_classes=7).double()
    plain.load_state_dict(network.state_dict())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    got = gradients(network, x)
    assert_matches_oracle(
        got, plain, feedback, x, unlike=["conv1.weight", "layer3.0.conv1.weight"], oracles=ORACLES_IN_PLACE
    )
    # the layers above which no error signal has met a V have backprop's gradients
    apart = distances(got, by_backprop(plain, x))
    assert max(apart[name] for name in ("fc.weight", "fc.bias", "layer4.1.conv2.weight")) <= TOLERANCE


ORACLES_IN_PLACE = {"saved tensors": ORACLES["saved tensors"]}  # ResNet's activations are in place


def test_the_last_layer_can_follow_the_rule_too(recipe):
    network, patch = build(recipe, 7, rule="sign-symmetry", last_layer_exact=False, seed=3)
    want = network.fc.weight.detach().sign() / math.sqrt(512)
    roundings = 3 * ROUNDING["float32"]  # of s and of its inverse, and of the quotient
    torch.testing.assert_close(patch.feedback("fc"), want, rtol=roundings, atol=0)
    x = torch.randn(2, 3, 32, 32)
    plain = torchvision.models.resnet18(weights=None, num_classes=7)
    plain.load_state_dict(network.state_dict())
    assert_unlike(gradients(network, x), by_backprop(plain, x), ["layer4.1.conv2.weight"])


def test_the_network_starts_from_the_scales_of_the_paper_and_from_the_seed(recipe):
    one, _ = build(recipe, 1000, rule="sign-symmetry", seed=0)
    same, _ = build(recipe, 1000, rule="backprop", seed=0)
    other, _ = build(recipe, 1000, rule="backprop", seed=1)
    assert_same_state(one.state_dict(), same.state_dict())
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    for layer in one.modules():
        if isinstance(layer, nn.Conv2d):
            scale = recipe.rules.scale_of(layer.weight.shape)
            assert layer.weight.std().item() == pytest.approx(scale, rel=of_std(layer.weight.numel()))
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_the_yaml_holds_the_protocol(recipe):
    settings = yaml.safe_load(SCRIPT.with_suffix(".yaml").read_text())
    assert settings.keys() <= inspect.signature(recipe.Settings).parameters.keys()
    protocol = {
        "batch_size": 256,
        "lr": 0.1,
        "lr_step": 10,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "size": 224,
    }
    assert protocol.items() <= settings.items()
    assert settings["last_layer_exact"] is True
