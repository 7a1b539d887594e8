"""Which layers are patched, and what is said when a selection is wrong."""

import pytest
import timm
import torch
from torch import nn

import feedbackhook
from feedbackhook import LayerInfo
from feedbackhook.selection import find_targets


def network():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "block": nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)),
            "up": nn.ConvTranspose2d(16, 8, (2, 4), stride=2, groups=2),
            "head": nn.ModuleDict({"fc": nn.Linear(8, 5)}),
        }
    )


ALL = ["stem", "block.0", "block.2", "up", "head.fc"]

SELECTIONS = [
    ({}, ALL),
    ({"include": r"block\..*"}, ["block.0", "block.2"]),
    ({"include": r"block"}, None),
    ({"include": ["stem", "fc"]}, ["stem", "head.fc"]),
    ({"include": [nn.Conv2d]}, ["stem", "block.0", "block.2"]),
    ({"exclude": [nn.Conv2d, "up"]}, ["head.fc"]),
    ({"include": [nn.Conv2d], "exclude": r"block\..*"}, ["stem"]),
    ({"exclude": ["c"]}, None),
]


@pytest.mark.parametrize(("selection", "expected"), SELECTIONS, ids=str)
def test_selections(selection, expected):
    if expected is None:
        with pytest.raises(ValueError, match="matches no layer"):
            find_targets(network(), **selection)
    else:
        assert [target.info.name for target in find_targets(network(), **selection)] == expected


def test_what_a_rule_may_know_of_a_layer():
    infos = {target.info.name: target.info for target in find_targets(network())}
    assert infos["stem"] == LayerInfo("stem", "Conv2d", (8, 3, 3, 3), 27)
    assert infos["block.0"] == LayerInfo("block.0", "Conv2d", (8, 2, 3, 3), 18, 4)
    assert infos["up"] == LayerInfo("up", "ConvTranspose2d", (16, 4, 2, 4), 8 * 8, 2)
    assert infos["head.fc"] == LayerInfo("head.fc", "Linear", (5, 8), 8)


def with_recurrent(kind):
    def recurrent():
        return nn.Sequential(nn.Linear(3, 3), kind(3, 3))

    return recurrent


REFUSED = [
    (
        network,
        {"include": "blok.*"},
        ValueError,
        r"include: 'blok\.\*' matches no layer; similar names: 'block.2'",
    ),
    (
        network,
        {"include": ["head.fx"]},
        ValueError,
        r"include: 'head.fx' matches no layer; similar names: 'head.fc'",
    ),
    (network, {"include": [nn.Conv3d]}, ValueError, r"include: Conv3d matches no layer"),
    (network, {"include": ["fc", "nothing"]}, ValueError, r"include: 'nothing' matches no layer"),
    (network, {"include": ["fc"], "exclude": ["up"]}, ValueError, r"exclude=\['up'\] has no effect"),
    (network, {"exclude": ".*"}, ValueError, r"no layer is left to patch with exclude='\.\*'"),
    (network, {"include": 3}, TypeError, r"include must be a regular expression or a list, not 3"),
    (network, {"include": [3]}, TypeError, r"include must hold names or module types, but it holds 3"),
    (network, {"include": "("}, ValueError, r"include='\(' is not a regular expression"),
    (nn.ReLU, {}, ValueError, r"ReLU has nothing to patch: it has no layer of the kinds Linear, Conv1d"),
    (with_recurrent(nn.LSTM), {}, TypeError, r"LSTM '1' computes in one fused call.*exclude=\['1'\]"),
    (with_recurrent(nn.GRU), {}, TypeError, r"GRU '1' computes in one fused call"),
    (with_recurrent(nn.LSTMCell), {}, TypeError, r"LSTMCell '1' computes in one fused call"),
    (lambda: nn.LSTM(3, 3), {}, TypeError, r"LSTM '' computes in one fused call"),
    (lambda: nn.Sequential(nn.LazyLinear(3)), {}, ValueError, r"LazyLinear '0' has no weight yet"),
]


def readable(value):
    return getattr(value, "__name__", str(value))[:40]


def hooks_and_attributes(module):
    return len(module._forward_hooks), len(module._forward_pre_hooks), list(module.__dict__)


@pytest.mark.parametrize(("make", "selection", "error", "message"), REFUSED, ids=readable)
def test_bad_selections_are_refused_and_leave_the_model_alone(make, selection, error, message):
    model = make()
    before = {name: hooks_and_attributes(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        feedbackhook.patch(model, **selection)
    assert {name: hooks_and_attributes(module) for name, module in model.named_modules()} == before
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_an_excluded_recurrent_layer_stays_exact():
    model = with_recurrent(nn.LSTM)()
    with feedbackhook.patch(model, exclude=[nn.LSTM]) as patch:
        assert [row.name for row in patch.layers] == ["0"]


def test_a_weight_shared_with_an_excluded_layer_is_refused():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    model["decoder"].weight = model["encoder"].weight
    with pytest.raises(
        ValueError, match="'encoder' and 'decoder' share a weight; patch both or exclude both"
    ):
        feedbackhook.patch(model, exclude=["decoder"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: timm.create_model("resnet10t", num_classes=7), ["fc"]),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1, img_size=32), ["head"]),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1), ["head", "head_dist"]),
        (network, ["head.fc"]),
    ],
    ids=["timm resnet", "timm vit", "timm deit distilled", "no get_classifier"],
)
def test_the_classifier_is_found(model, expected):
    model = model()
    assert feedbackhook.classifier(model) == expected
    with feedbackhook.patch(model, exclude=feedbackhook.classifier(model)) as patch:
        assert not set(expected) & {row.name for row in patch.layers}


def test_the_classifiers_name_selects_no_layer_that_only_ends_with_it():
    model = nn.ModuleDict(
        {"stem": nn.Linear(4, 4), "block": nn.ModuleDict({"head": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)}
    )
    names = feedbackhook.classifier(model)
    assert names == ["head"]

    def patched(**selection):
        with feedbackhook.patch(model, **selection) as patch:
            return [row.name for row in patch.layers]

    assert patched(exclude=names) == ["stem", "block.head"]
    assert patched(exclude=[*names, "stem"]) == ["block.head"]
    assert patched(include=names) == ["head"]
    assert patched(exclude=["head"]) == ["stem"]  # a name that is typed is a suffix, too


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="ResNet has no classifier that can be patched"):
        feedbackhook.classifier(timm.create_model("resnet10t", num_classes=0))
    with pytest.raises(ValueError, match="ReLU has no classifier"):
        feedbackhook.classifier(nn.ReLU())


def test_a_patched_single_layer_is_the_root():
    layer = nn.Linear(3, 2)
    with feedbackhook.patch(layer, "uSF") as patch:
        x = torch.randn(5, 3, requires_grad=True)
        layer(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(5, 2) @ torch.sign(layer.weight))
        assert str(patch).splitlines()[1].startswith("(root)  Linear  2x3     uSF   1      1")
