"""The code blocks of the README run without changes."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support import bounds
from torch import nn

import feedbackhook

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def _small_timm(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create("resnet10t", **options))


def test_the_first_lines(capsys):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    names = {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "x": torch.randn(6, 4),
        "y": torch.randint(3, (6,)),
    }
    exec(BLOCKS[0], names)
    assert "sign(concordance=0.8)" in capsys.readouterr().out
    assert feedbackhook.get_patch(model) is None
    assert names["patch"].layers[1].rerouted == 1


@pytest.mark.usefixtures("_small_timm")
def test_the_loop(capsys):
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]
    names = {"batches": batches}
    exec(BLOCKS[1], names)
    layers = names["patch"].layers
    assert [row.rerouted for row in layers] == [0] + [2] * (len(layers) - 1)
    assert "fc" not in {row.name for row in layers}
    assert "weight_angle" in capsys.readouterr().out
    agreement = [row.value for row in feedbackhook.measure(names["patch"]) if row.metric == "sign_agreement"]
    assert sum(agreement) / len(agreement) == pytest.approx(
        0.75, abs=bounds.of_share(0.75, 9408)
    )  # the first layer's weights


def test_the_mapping():
    model = timm.create_model("resnet18", num_classes=10)
    exec(BLOCKS[2], {"feedbackhook": feedbackhook, "model": model})
    rules = {row.name: row.rule for row in feedbackhook.get_patch(model).layers}
    assert rules["conv1"] == "symmetric"
    assert rules["layer2.0.conv1"] == "sign(concordance=0.7)"
    assert not any(name.startswith(("layer4", "fc")) for name in rules)


@pytest.mark.usefixtures("_small_timm")
def test_the_watched_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        folder = Path("cifar10/train") / str(number)
        folder.mkdir(parents=True)
        for image in range(13):
            Image.effect_noise((32, 32), 50 + image).convert("RGB").save(folder / f"{image}.png")
    exec(BLOCKS[6], {})
    table = feedbackhook.read("runs/resnet18")
    assert set(table["step"]) == {0}
    assert {"error_angle", "gradient_norm", "learning_rate"} < set(table["metric"])


def test_the_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    names = {"feedbackhook": feedbackhook, "torch": torch, "model": model}
    names |= {f"x{n}": torch.randn(6, 4) for n in (1, 2)} | {f"y{n}": torch.randint(3, (6,)) for n in (1, 2)}
    exec(BLOCKS[5], names)
    assert "sign, concordance 0.75" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"profile.csv", "profile.png"}


def test_the_rule_of_ones_own():
    model = nn.Linear(4, 4)
    exec(BLOCKS[3], {"feedbackhook": feedbackhook, "model": model})
    assert feedbackhook.get_patch(model).layers[0].rule == "noisy(std=0.5)"


def test_direct_feedback(capsys):
    model = timm.create_model("resnet10t", num_classes=3)
    names = {
        "feedbackhook": feedbackhook,
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "x": torch.randn(2, 3, 32, 32),
        "y": torch.tensor([0, 2]),
    }
    exec(BLOCKS[4], names)
    layers = names["patch"].layers
    assert [row.name for row in layers] == [f"layer{n}.0" for n in (1, 2, 3, 4)]
    assert all(row.rerouted == 1 for row in layers)
    assert "4096x3" in capsys.readouterr().out


def test_every_block_is_tried():
    assert len(BLOCKS) == 7
