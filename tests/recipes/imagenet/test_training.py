"""Training by the ImageNet recipe against plain loops."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from support.bounds import HALF_OF_FLOAT32, ROUNDING
from support.imagenet import (
    LR,
    SMALL,
    assert_same_state,
    by_plain_backprop,
    by_the_oracle,
    checkpoint_of,
    make_tree,
    relative_distance,
    replay,
    spy_on_batches,
    train,
)
from torch import nn

import feedbackhook


def test_training_is_the_oracles_and_not_backprops(recipe, tmp_path, monkeypatch, capsys):
    root, output = make_tree(tmp_path / "images"), tmp_path / "run"
    batches = spy_on_batches(recipe, monkeypatch)
    train(recipe, root, output)
    got = checkpoint_of(output)["model"]
    assert len(batches) == 3
    want, exact = (replay(batches, backward) for backward in (by_the_oracle, by_plain_backprop))
    assert relative_distance(got, want) < HALF_OF_FLOAT32
    assert relative_distance(got, replay(batches, by_the_oracle, weight_decay=0)) > HALF_OF_FLOAT32
    assert relative_distance(want, exact) > 1e-2

    out = capsys.readouterr().out
    assert "24 training and 12 test images of 3 classes" in out
    assert "exact: fc" in out
    assert "epoch 1/1: train loss" in out
    table = feedbackhook.read(output)
    whole = table[table["layer"].isna() & (table["step"] == 3)].set_index("metric")["value"]
    assert {"train_loss", "train_error", "test_loss", "test_error", "images_per_second"} <= set(whole.index)
    assert whole["test_error_top5"] == 0  # of three classes
    layers = table[table["layer"].notna()]
    assert set(layers["layer"]) == {name.removesuffix(".weight") for name in got if got[name].dim() == 4}
    assert set(layers["step"]) == {0, 2}
    assert {"weight_angle", "error_angle", "sign_agreement", "norm_ratio"} <= set(layers["metric"])
    assert (layers.loc[layers["metric"] == "sign_agreement", "value"] == 1).all()
    settings = yaml.safe_load((output / "settings.yaml").read_text())
    assert (settings["rule"], settings["lr"], settings["size"]) == ("sign-symmetry", LR, 32)


def test_backprop_is_plain_and_the_rate_falls_in_steps(recipe, tmp_path, monkeypatch):
    root, output = make_tree(tmp_path / "images", train=6), tmp_path / "run"
    batches = spy_on_batches(recipe, monkeypatch)
    train(recipe, root, output, rule="backprop", epochs=2, lr_step=1)
    assert len(batches) == 4  # 18 images: two whole batches an epoch
    assert batches[0][1].tolist() != batches[2][1].tolist()  # in another order each epoch
    want = replay(batches, by_plain_backprop, rates=[LR, LR, LR / 10, LR / 10])
    assert relative_distance(checkpoint_of(output)["model"], want) < HALF_OF_FLOAT32
    assert checkpoint_of(output)["patch"] is None
    table = feedbackhook.read(output)
    assert not table["layer"].notna().any()
    rates = table[table["metric"] == "learning_rate"].sort_values("epoch")["value"].tolist()
    assert rates == pytest.approx([LR, LR / 10])


@pytest.mark.slow
def test_mixed_precision_keeps_the_rule(recipe, tmp_path, monkeypatch):
    root, output = make_tree(tmp_path / "images", train=3), tmp_path / "run"
    batches = spy_on_batches(recipe, monkeypatch)
    train(recipe, root, output, bf16=True)
    assert len(batches) == 1
    state = checkpoint_of(output)["model"]
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}

    outputs = []

    def under_autocast(network, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        outputs.append(logits)
        F.cross_entropy(logits.float(), y).backward()

    def patched(network, x, y):
        exclude = feedbackhook.classifier(network)
        with feedbackhook.patch(network, "sign-symmetry", exclude=exclude):
            under_autocast(network, x, y)

    want = replay(batches, patched)
    assert relative_distance(state, want) < HALF_OF_FLOAT32
    assert relative_distance(state, replay(batches, under_autocast)) > 1e-2
    assert {logits.dtype for logits in outputs} == {torch.bfloat16}


def test_an_interrupted_run_goes_on_bit_equal(recipe, tmp_path, monkeypatch, capsys):
    root = make_tree(tmp_path / "images")
    rule = {"rule": "sign", "options": {"concordance": 0.75, "redraw": "update"}}
    options = {**rule, "model": SMALL, "epochs": 2}
    train(recipe, root, tmp_path / "whole", **options)

    saves, original = [], recipe.save

    def save(path, state):
        if len(saves) == 1:
            raise KeyboardInterrupt  # after the second epoch's rows, before its checkpoint
        saves.append(path)
        original(path, state)

    monkeypatch.setattr(recipe, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, root, tmp_path / "run", **options)
    monkeypatch.setattr(recipe, "save", original)
    assert checkpoint_of(tmp_path / "run")["epoch"] == 1
    assert feedbackhook.read(tmp_path / "run")["epoch"].max() == 2
    torch.manual_seed(99)  # whatever the process has drawn before
    capsys.readouterr()
    train(recipe, root, tmp_path / "run", **options)
    assert "resuming after epoch 1" in capsys.readouterr().out

    one, other = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "run")
    assert_same_state(one["model"], other["model"])
    for number, state in one["optimizer"]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], other["optimizer"]["state"][number]["momentum_buffer"]
        ), number
    assert one["patch"] == other["patch"]
    assert one["patch"]["layers"]["features.0"]["draws"] == 6  # redrawn after each step: three in each epoch
    tables = []
    for name in ("whole", "run"):
        table = feedbackhook.read(tmp_path / name).drop(columns="run")
        keys = ["step", "epoch", "layer", "metric"]
        assert not table.duplicated(keys).any()
        tables.append(table[table["metric"] != "images_per_second"].sort_values(keys, ignore_index=True))
    assert tables[0].equals(tables[1])

    train(recipe, root, tmp_path / "run", **options)
    assert "is finished: test error" in capsys.readouterr().out
    assert_same_state(checkpoint_of(tmp_path / "run")["model"], other["model"])


@pytest.mark.slow
def test_reading_in_workers_is_repeated_too(recipe, tmp_path, monkeypatch):
    root = make_tree(tmp_path / "images")
    batches = spy_on_batches(recipe, monkeypatch)
    for output in ("one", "other"):
        torch.manual_seed(hash(output) % 1000)
        train(recipe, root, tmp_path / output, rule="backprop", model=SMALL, workers=2)
    for (x, y), (x_again, y_again) in zip(batches[:3], batches[3:], strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


def test_errors_are_counted_over_all_images(recipe):
    logits = torch.randn(40, 7)
    y = torch.randint(7, (40,))
    ranks = (logits > logits.gather(1, y[:, None])).sum(1)
    batches = [(logits[:26], y[:26]), (logits[26:], y[26:])]
    got = recipe.evaluate(Accelerator(cpu=True), nn.Identity(), iter(batches))
    assert got["test_error"] == 100 * (ranks > 0).sum().item() / 40  # counts are exact
    assert got["test_error_top5"] == 100 * (ranks > 4).sum().item() / 40
    # Both are sums of 40 float32 numbers, which round at most 40 times each.
    loss = F.cross_entropy(logits, y).item()
    assert got["test_loss"] == pytest.approx(loss, rel=2 * 40 * ROUNDING["float32"])
    assert 0 < got["test_error_top5"] < got["test_error"] < 100
