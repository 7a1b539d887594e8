"""`feedbackhook inspect`: layers in forward order, and what a patch would do to them."""

import json

import pytest
from support.bounds import of_angle

from feedbackhook.cli import main
from feedbackhook.experiments.models.inspection import InspectConfig, inspect


def test_layers_of_the_papers_network():
    found = inspect(InspectConfig("liao2016/mnist", mode="uSF"))
    assert [(layer.depth, layer.name, layer.kind, layer.weights) for layer in found.layers] == [
        (0, "conv1", "Conv2d", 500),
        (1, "conv2", "Conv2d", 25_000),
        (2, "fc1", "Linear", 400_000),
        (3, "fc2", "Linear", 5_000),
    ]
    assert [layer.input_requires_grad for layer in found.layers] == [False, True, True, True]
    assert found.parameters == 431_080
    assert found.patched_weights == 430_500
    # uniform initial weights: 30 degrees in large layers
    assert found.layers[2].weight_angle == pytest.approx(30.0, abs=of_angle(400_000))


def test_forward_order_is_not_the_order_of_registration():
    found = inspect(InspectConfig("resnet18", size=32))
    depth = {layer.name: layer.depth for layer in found.layers}
    assert [layer.depth for layer in found.layers] == list(range(len(found.layers)))
    assert depth["conv1"] == 0
    assert depth["fc"] == len(depth) - 1
    assert depth["layer2.0.conv2"] < depth["layer2.0.downsample.0"]


def test_excluded_layers_are_shown_as_exact():
    found = inspect(InspectConfig("timm/resnet10t", size=32, exclude=["fc"], options={"concordance": 0.5}))
    rules = {layer.name: layer.rule for layer in found.layers}
    assert rules["fc"] is None
    assert set(rules.values()) == {None, "sign(concordance=0.5)"}
    assert found.patched_weights == sum(layer.weights for layer in found.layers if layer.name != "fc")


def test_the_table(capsys):
    assert main(["inspect", "liao2016/mnist", "--mode", "frSF", "--options.concordance", "0.75"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = "depth layer kind shape weights rule input grad angle V, W norm V / W"
    assert " ".join(lines[1].split()) == heading
    assert " ".join(lines[3].split()).startswith("0 conv1 Conv2d 20x1x5x5 500 frSF(concordance=0.75) no ")
    assert lines[-2].startswith("liao2016/mnist on an image of 1x28x28: 4 layers, 4 patched, 3 of these send")
    assert lines[-1] == "431,080 parameters, 430,500 of them (99.9%) patched weights"


def test_json(capsys):
    assert main(["inspect", "vit_tiny_patch16_224", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"] == "timm/vit_tiny_patch16_224"
    assert content["image"] == [3, 224, 224]
    first, last = content["layers"][0], content["layers"][-1]
    assert (first["name"], first["kind"]) == ("patch_embed.proj", "Conv2d")
    assert first["input_requires_grad"] is False
    assert (last["name"], last["rule"], last["input_requires_grad"]) == ("head", "sign", True)


REFUSED = [
    (["resnet10x"], "timm has no model named 'resnet10x'; did you mean "),
    (["other/resnet18"], "no model is named 'other/resnet18'"),
    (["resnet10t", "--mode", "sgn"], "unknown mode 'sgn'; known: symmetric"),
    (["resnet10t", "--options.std", "1"], "mode 'sign' has no option 'std'; it has concordance"),
    (
        ["resnet10t", "--size", "32", "--exclude", "nothing"],
        "exclude: 'nothing' matches no layer; similar names",
    ),
    (["vit_tiny_patch16_224", "--size", "100"], "cannot take images of 100x100"),
    ([], "inspect.model"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_what_cannot_be_inspected_is_one_clear_line(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
