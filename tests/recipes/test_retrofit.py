"""The recipes for whole networks run on very little data, and set up what they say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from support.recipes import RECIPES, load_recipe

import feedbackhook
from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.sweep.grid import plan, stored
from feedbackhook.report.runs import collect

RETROFIT = RECIPES / "retrofit"


@pytest.fixture
def recipe(request: pytest.FixtureRequest) -> ModuleType:
    return load_recipe(f"retrofit/{request.param}")


def sweep_of(name: str) -> SweepConfig:
    """The sweep of a recipe's YAML."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepConfig)
    given = parser.instantiate(parser.parse_path(str(RETROFIT / f"{name}.yaml")))
    return SweepConfig(**{key: given[key] for key in SweepConfig.__dataclass_fields__})


def is_a_picture(path: Path) -> bool:
    return bool(plt.imread(path).std() > 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune"], indirect=True)
def test_fine_tuning_begins_alike_and_ends_in_a_plain_model(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--smoke", "--output", str(tmp_path), "--workers", "2"])
    assert "sign, concordance 0.75" in capsys.readouterr().out
    assert is_a_picture(tmp_path / "finetune.png")
    runs = collect(tmp_path)
    assert list(runs.runs["status"]) == ["finished"] * 6
    first = runs.rows(["test_loss"])
    assert first.loc[first["epoch"] == 0, "value"].nunique() == 1
    assert first.loc[first["epoch"] == 1, "value"].nunique() == 6
    angles = runs.rows(of_layers=["gradient_angle"])
    assert sorted(set(angles["step"])) == [0, 2]  # before, and in the last step
    assert (angles.groupby("run")["layer"].nunique() > 10).all()
    plain = timm.create_model("test_efficientnet", num_classes=10, in_chans=1)
    for folder in runs.runs["folder"]:
        plain.load_state_dict(load_file(Path(folder) / "last.safetensors"), strict=True)

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    recipe.main(["--smoke", "--output", str(tmp_path), "--workers", "2"])
    assert weights == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize("recipe", ["finetune"], indirect=True)
@pytest.mark.parametrize(
    ("model", "head", "last"),
    [
        (
            "timm/tf_efficientnet_lite0",
            {"classifier"},
            {"blocks.5", "blocks.6", "conv_head", "bn2", "classifier"},
        ),
        ("timm/resnet18", {"fc"}, {"layer3", "layer4", "fc"}),
        ("timm/vit_tiny_patch16_224", {"head"}, {"blocks.10", "blocks.11", "norm", "head"}),
    ],
)
def test_the_depth_is_counted_in_timms_own_groups(
    recipe: ModuleType, model: str, head: set[str], last: set[str]
) -> None:
    import re

    network = timm.create_model(model.removeprefix("timm/"))
    for depth, parts in (("head", head), ("last", last)):
        pattern = re.compile(recipe.trainable(model, depth)[1])
        matched = {name for name, _ in network.named_parameters() if pattern.fullmatch(name)}
        assert matched == {
            name
            for name, _ in network.named_parameters()
            if any(name == part or name.startswith(f"{part}.") for part in parts)
        }
    assert recipe.trainable(model, "whole") == []


def test_fine_tuning_is_as_it_is_reported() -> None:
    config = sweep_of("finetune")
    assert (config.data.train_images, config.data.test_images, config.data.size) == (2000, 2000, 96)
    assert (config.protocol.epochs, config.protocol.seeds, len(config.conditions)) == (5, 3, 6)
    assert (config.model.name, config.model.weights) == ("timm/tf_efficientnet_lite0", "package")
    assert len(plan(config)) == 18


@pytest.mark.parametrize("recipe", ["layers"], indirect=True)
def test_layer_by_layer_reroutes_what_each_condition_names(recipe: ModuleType, tmp_path: Path) -> None:
    assert recipe.parts("cifar/resnet20") == ["layer1", "layer2", "layer3", "fc"]
    own = yaml.safe_load((RETROFIT / "layers.yaml").read_text())["conditions"]
    config = sweep_of("layers")
    config.conditions = own | recipe.conditions("cifar/resnet20")
    rules = {}
    for run in plan(config):
        f = run.config.feedback
        model = build(run.config.model, 10, 1, (16, 16))
        if f.mode is not None:
            patch = feedbackhook.patch(model, f.mode, include=f.include, exclude=f.exclude, **f.options)
            rules[run.condition] = {row.name.partition(".")[0]: row.rule for row in patch.layers}
    assert set(rules["only layer2 at 0.75"]) == {"layer2"}
    assert set(rules["all but fc at 0.5"]) == {"conv1", "layer1", "layer2", "layer3"}
    assert "0.75" in rules["only layer2 at 0.75"]["layer2"]
    falling = rules["1 at the input to 0.5 at the output"]
    assert ["concordance=0.5" in falling[part] for part in ("layer1", "layer3", "fc")] == [False, True, True]
    assert len(rules) == 7 + 2 * 3 * 4


@pytest.mark.parametrize("recipe", ["layers"], indirect=True)
def test_layer_by_layer_trains_and_draws(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "CONCORDANCES", (0.5,))
    recipe.main(["--smoke", "--output", str(tmp_path), "--workers", "2", "--data.size", "8"])
    assert is_a_picture(tmp_path / "layers.png")
    runs = collect(tmp_path)
    assert len(runs.runs) == 8 + 2 * 4
    by_condition = runs.runs.set_index("condition")
    rows = runs.rows(of_layers=["sign_agreement"])
    patched = rows.groupby("run")["layer"].unique()
    only = patched[by_condition.loc["only layer3 at 0.5", "run"]]
    assert {name.partition(".")[0] for name in only} == {"layer3"}


@pytest.mark.parametrize("recipe", ["normalize"], indirect=True)
def test_normalizing_shows_how_the_error_signal_grows(recipe: ModuleType, tmp_path: Path) -> None:
    recipe.main(["--smoke", "--output", str(tmp_path), "--workers", "2", "--model.options", "{width: 0.125}"])
    assert is_a_picture(tmp_path / "normalize.png")
    norms = recipe.gradients(tmp_path).pivot_table("value", "depth", "condition")
    growth = np.log10(norms.loc[0] / norms.loc[13])
    assert growth["uSF"] > 10
    assert abs(growth["sign (norm of W)"]) < 2
    pd.testing.assert_series_equal(norms["uSF"], norms["uSF+BM"], check_names=False)
    config = stored(tmp_path)
    assert list(growth.index) == sorted(config.conditions)


@pytest.mark.parametrize("recipe", ["scratch"], indirect=True)
def test_from_scratch_trains_each_kind_of_network(recipe: ModuleType, tmp_path: Path) -> None:
    conditions = "{backprop: {feedback: {mode: null}}, random: {feedback: {mode: random}}}"
    recipe.main(
        ["--smoke", "--output", str(tmp_path), "--networks", "vit", "mixer", "--conditions", conditions]
    )
    assert is_a_picture(tmp_path / "scratch.png")
    runs = collect(tmp_path).runs
    assert list(runs["status"]) == ["finished"] * 4
    assert set(runs["model"]) == {"timm/vit_tiny_patch16_224", "cifar/mixer"}
    assert set(runs["optimizer"]) == {"timm/adamw"}


@pytest.mark.parametrize("recipe", ["scratch"], indirect=True)
def test_every_network_from_scratch_takes_images_of_both_sizes(recipe: ModuleType) -> None:
    from feedbackhook.experiments.config import ModelConfig

    for size in (16, 32):
        for options in recipe.NETWORKS.values():
            given = options.get("model.options", "{{}}").format(size=size, patch=size // 16)
            config = ModelConfig(options["model.name"], options=yaml.safe_load(given))
            model = build(config, 10, 3, (size, size))
            feedbackhook.patch(model, "sign", concordance=0.75)
            assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("recipe", ["normalize"], indirect=True)
def test_a_recipe_that_cannot_run_ends_with_the_reason(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe.main(["--smoke", "--output", str(tmp_path / "a"), "--model.name", "cifar/vgg61"])
    assert ended.value.code == 1
    assert "no model is named 'cifar/vgg61'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        recipe.main(["--datasets", "[MNIST]", "--data.root", str(tmp_path), "--output", str(tmp_path / "b")])
    assert ended.value.code == 2
    assert "--data.download true" in capsys.readouterr().err
