"""The ImageNet recipe: rules against formulas and oracle, training against plain loops, and each error."""

import copy
import importlib.util
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from bounds import HALF_OF_FLOAT32, HANG, ROUNDING, of_mean, of_std
from oracle import (
    ORACLES,
    TOLERANCE,
    assert_matches_oracle,
    assert_unlike,
    by_backprop,
    distances,
    gradients,
    swapped_saved_tensors,
)
from PIL import Image
from torch import nn

import feedbackhook

SCRIPT = Path(__file__).parents[1] / "recipes" / "imagenet" / "resnet18.py"
LR = 0.02
WEIGHT_DECAY = 0.1  # so large that a step without it would show
SMALL = "squeezenet1_1"  # where the network does not matter; it draws dropout, too


@pytest.fixture
def recipe():
    """The recipe as a module; Accelerate, which keeps one state for the process, begins anew."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_tree(root, classes=3, train=8, test=4, noise=True):
    """JPEG files of 64 to 80 pixels: noise, or one colour each, which no crop and no flip changes."""
    generator = np.random.default_rng(1)
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                colour = generator.integers(0, 256, 3)
                pixels = np.tile(colour, (64 + number % 17, 80 - number % 17, 1))
                if noise:
                    pixels = (pixels + generator.integers(0, 128, pixels.shape)) % 256
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"image{number}.JPEG")
    return root


def train(recipe, root, output, **options):
    """The recipe's `main`, small and on one CPU process."""
    small = {"epochs": 1, "batch_size": 8, "size": 32, "lr": LR, "watch_every": 2, "workers": 0}
    small["weight_decay"] = WEIGHT_DECAY
    try:
        recipe.main(**{**small, "root": root, "output": output, "cpu": True, **options})
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def checkpoint_of(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def relative_distance(got, want):
    """Of all weights together. Where two have trained alike in float32 it is less than half of its digits; no
    weight decay or another rule shows in the other half."""
    pairs = [(got[name].double(), want[name].double()) for name in want]
    difference = sum((a - b).square().sum() for a, b in pairs)
    return float((difference / sum(b.square().sum() for _, b in pairs)).sqrt())


# --- the rules --------------------------------------------------------------------------------------------

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
    patch = feedbackhook.patch(nn.Sequential(layer), "sign-symmetry")
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
        feedbackhook.patch(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)), "sign-symmetry")


@pytest.mark.parametrize("rule", ["sign-symmetry", "feedback-alignment"])
def test_gradients_are_the_oracles_and_the_last_layer_is_exact(recipe, rule):
    network, patch = recipe.build("resnet18", 7, rule, {}, True, seed=3)
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
    network, patch = recipe.build("resnet18", 7, "sign-symmetry", {}, False, seed=3)
    want = network.fc.weight.detach().sign() / math.sqrt(512)
    roundings = 3 * ROUNDING["float32"]  # of s and of its inverse, and of the quotient
    torch.testing.assert_close(patch.feedback("fc"), want, rtol=roundings, atol=0)
    x = torch.randn(2, 3, 32, 32)
    plain = torchvision.models.resnet18(weights=None, num_classes=7)
    plain.load_state_dict(network.state_dict())
    assert_unlike(gradients(network, x), by_backprop(plain, x), ["layer4.1.conv2.weight"])


def test_the_network_starts_from_the_scales_of_the_paper_and_from_the_seed(recipe):
    one, _ = recipe.build("resnet18", 1000, "sign-symmetry", {}, True, seed=0)
    same, _ = recipe.build("resnet18", 1000, "backprop", {}, True, seed=0)
    other, _ = recipe.build("resnet18", 1000, "backprop", {}, True, seed=1)
    assert_same_state(one.state_dict(), same.state_dict())
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    for layer in one.modules():
        if isinstance(layer, nn.Conv2d):
            scale = recipe.scale_of(layer.weight.shape)
            assert layer.weight.std().item() == pytest.approx(scale, rel=of_std(layer.weight.numel()))
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_the_yaml_holds_the_protocol(recipe):
    settings = yaml.safe_load(SCRIPT.with_suffix(".yaml").read_text())
    assert settings.keys() <= inspect.signature(recipe.main).parameters.keys()
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


# --- training ---------------------------------------------------------------------------------------------


def spy_on_batches(recipe, monkeypatch):
    """The mini-batches that training sees, in order."""
    seen, original = [], recipe.train_epoch

    def train_epoch(accelerator, model, optimizer, batches):
        def noted():
            for x, y in batches:
                seen.append((x.clone(), y.clone()))
                yield x, y

        return original(accelerator, model, optimizer, noted())

    monkeypatch.setattr(recipe, "train_epoch", train_epoch)
    return seen


def replay(batches, backward, rates=None, weight_decay=WEIGHT_DECAY):
    """SGD on the same mini-batches from the same start; `backward(network, x, y)` makes the gradients."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=3)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=weight_decay)
    for (x, y), rate in zip(batches, rates or [LR] * len(batches), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        backward(network, x, y)
        optimizer.step()
    return network.state_dict()


def by_the_oracle(network, x, y):
    feedback = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            w = layer.weight.detach()
            feedback[name] = w.sign() * math.sqrt(2 / (w.shape[2] * w.shape[3] * w.shape[0]))
    with swapped_saved_tensors(network, feedback):
        loss = F.cross_entropy(network(x), y)
    loss.backward()


def by_plain_backprop(network, x, y):
    F.cross_entropy(network(x), y).backward()


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


def test_mixed_precision_keeps_the_rule(recipe, tmp_path, monkeypatch):
    root, output = make_tree(tmp_path / "images"), tmp_path / "run"
    batches = spy_on_batches(recipe, monkeypatch)
    train(recipe, root, output, bf16=True)
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
    assert "going on after epoch 1" in capsys.readouterr().out

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


# --- what is wrong is said --------------------------------------------------------------------------------


def flat_val(root):
    for folder in list((root / "val").iterdir()):
        for number, image in enumerate(folder.iterdir()):
            image.rename(root / "val" / f"ILSVRC2012_val_{folder.name}{number}.JPEG")
        folder.rmdir()


def half_sorted_val(root):
    image = next((root / "val" / "n00000001").iterdir())
    image.rename(root / "val" / image.name)


def flat_train(root):
    image = next((root / "train" / "n00000001").iterdir())
    image.rename(root / "train" / image.name)


def archives(root):
    for folder in list((root / "train").iterdir()):
        (root / "train" / f"{folder.name}.tar").touch()


def no_classes(root):
    (root / "train").rename(root / "elsewhere")
    (root / "train").mkdir()


def other_classes(root):
    (root / "val" / "n00000002").rename(root / "val" / "tench")


def a_class_too_few(root):
    (root / "train" / "n00000002").rename(root / "elsewhere")


def empty_class(root):
    for image in (root / "val" / "n00000001").iterdir():
        image.unlink()


def broken_image(root):
    image = root / "train" / "n00000001" / "image0.JPEG"
    image.write_bytes(image.read_bytes()[:600])


FOLDERS = {
    flat_val: (
        ValueError,
        r"12 images lie in .*val itself.*n01440764.*devkit.*ImageNet\('.*images', 'val'\)",
    ),
    half_sorted_val: (ValueError, "1 images lie in .*val itself"),
    flat_train: (ValueError, "1 images lie in .*train itself; each must lie in the folder of its class"),
    archives: (ValueError, r"3 archives \(.tar\) lie in .*train: unpack each"),
    no_classes: (FileNotFoundError, "train holds no class folders"),
    other_classes: (ValueError, "val lacks the folders of 1 classes that .*train has: n00000002"),
    a_class_too_few: (ValueError, "train lacks the folders of 1 classes that .*val has: n00000002"),
    empty_class: (FileNotFoundError, r"val: .*n00000001"),
    broken_image: (OSError, "n00000001/image0.JPEG cannot be read as an image"),
}


@pytest.mark.parametrize("damage", FOLDERS, ids=lambda damage: damage.__name__)
def test_a_folder_that_cannot_be_read_is_named(recipe, tmp_path, damage):
    root = make_tree(tmp_path / "images")
    damage(root)
    kind, message = FOLDERS[damage]
    with pytest.raises(kind, match=message):
        train(recipe, root, tmp_path / "run", rule="backprop", model=SMALL)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


OPTIONS = {
    "root": (
        {"root": Path("nowhere")},
        FileNotFoundError,
        "no folder nowhere/train: --root names the folder",
    ),
    "epochs": ({"epochs": 0}, ValueError, "--epochs must be 1 or more"),
    "seed": ({"seed": -1}, ValueError, "--seed must be 0 or more"),
    "batch": ({"batch_size": 25}, ValueError, "a batch of 25 is more than the 24 images"),
    "rule": ({"rule": "mirror"}, ValueError, "unknown mode 'mirror'; known: .*sign-symmetry"),
    "options": ({"options": {"concordance": 0.5}}, TypeError, "'sign-symmetry' has no option 'concordance'"),
    "none": ({"rule": "backprop", "options": {"std": 1}}, ValueError, "backprop has no options, .* std"),
    "model": ({"model": "resnet17"}, ValueError, "resnet17"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_named(recipe, tmp_path, case):
    root = make_tree(tmp_path / "images")
    options, kind, message = OPTIONS[case]
    with pytest.raises(kind, match=message):
        train(recipe, **{"root": root, "output": tmp_path / "run", **options})


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(recipe, tmp_path):
    root, output = make_tree(tmp_path / "images"), tmp_path / "run"
    train(recipe, root, output, rule="backprop", model=SMALL)
    with pytest.raises(ValueError, match=r"with rule backprop, not sign-symmetry.*give another --output"):
        train(recipe, root, output, model=SMALL)
    with pytest.raises(ValueError, match=rf"with lr {LR}, not 0.5"):
        train(recipe, root, output, rule="backprop", model=SMALL, lr=0.5)
    path = output / "checkpoint.pt"
    for content in (b"", b"not a checkpoint", path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .* give another --output"):
            train(recipe, root, output, rule="backprop", model=SMALL)


def test_a_run_that_diverges_says_so_and_keeps_its_table(recipe, tmp_path):
    root, output = make_tree(tmp_path / "images"), tmp_path / "run"
    with pytest.raises(FloatingPointError, match="train_loss is nan in epoch 1: this run diverges"):
        train(recipe, root, output, rule="backprop", model=SMALL, lr=1e30)
    table = feedbackhook.read(output)
    assert table.loc[table["metric"] == "train_loss", "value"].isna().all()
    assert not (output / "checkpoint.pt").exists()


# --- the cost, and the smoke run --------------------------------------------------------------------------


def test_the_dry_run_prints_the_hours_of_the_run(recipe, tmp_path, monkeypatch, capsys):
    root = make_tree(tmp_path / "images", train=9)
    monkeypatch.setattr(recipe, "_timed", lambda work: (work(), 36.0))
    train(recipe, root, tmp_path / "run", dry_run=True, steps=2, epochs=100)
    out = capsys.readouterr().out
    # 16 images in 36 s; of 27 training images 24 are in whole batches, and 12 are tested, in each epoch
    assert f"{(24 + 12) * 100 / (16 / 36) / 3600:,.1f} hours" in out
    assert "device hours" in out
    assert "100 x (27 + 12) images" in out
    network = torchvision.models.resnet18(num_classes=3)
    # Weights, their momentum, and running statistics.
    saved = [*network.parameters(), *network.parameters(), *network.buffers()]
    least = sum(tensor.nbytes for tensor in saved)
    most = least + 1000 * len(saved)  # and in the archive a kilobyte for each name, header and gap
    megabytes = float(out.split("checkpoint")[1].split("MB")[0])
    assert least / 1e6 - 0.05 <= megabytes <= most / 1e6 + 0.05  # told to a tenth
    assert f"reads and augments {64 / 36:.0f} images/s" in out
    assert not (tmp_path / "run").exists()


def test_the_dry_run_needs_no_images(recipe, tmp_path, capsys):
    small = {"model": SMALL, "steps": 1, "batch_size": 2, "size": 64}
    train(recipe, tmp_path / "nowhere", tmp_path / "run", dry_run=True, **small)
    out = capsys.readouterr().out
    assert "1 x (1,281,167 + 50,000) images" in out
    assert "not measured: there is no folder" in out
    assert " hours" in out


def test_the_smoke_run_trains_and_leaves_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(recipe, Path("nowhere"), None, smoke=True, model=SMALL)
    out = capsys.readouterr().out
    assert "epoch 2/2" in out
    assert "exact: classifier.1" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line_reads_the_yaml_and_its_options(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--smoke",
        "true",
        "--rule",
        "sign",
        "--options.concordance",
        "0.75",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sign(concordance=0.75)" in done.stdout


# --- two processes ----------------------------------------------------------------------------------------


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SCRIPT), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    "rule",
    [("sign-symmetry", {}), ("sign", {"concordance": 0.75, "redraw": "update"})],
    ids=lambda rule: rule[0],
)
def test_two_processes_equal_a_plain_loop_over_the_halves_of_each_batch(recipe, tmp_path, monkeypatch, rule):
    """Each process normalises its half of a batch by the half's own statistics, as everywhere without
    SyncBatchNorm, and the running ones are the first process's. Images of one colour: no augmentation."""
    rule, rule_options = rule
    root = make_tree(tmp_path / "images", test=5, noise=False)  # 15 test images: the last batch is filled up
    given = {"root": root, "rule": rule, "batch_size": 8, "size": 32, "lr": LR, "workers": 0, "cpu": "true"}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    arguments += [part for name, value in rule_options.items() for part in (f"--options.{name}", value)]
    for epochs in (1, 2):  # the second goes on from the first's checkpoint
        done = torchrun(*arguments, "--output", tmp_path / "two", "--epochs", epochs)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(f"epoch {epochs}/{epochs}") == 1
        assert "2 x cpu" in done.stdout
    checkpoint = checkpoint_of(tmp_path / "two")

    batches = spy_on_batches(recipe, monkeypatch)
    train(recipe, root, tmp_path / "one", rule="backprop", epochs=2)
    assert len(batches) == 6

    def over_halves(mode, **options):
        patches = []

        def backward(network, x, y):
            if mode is not None and not patches:
                exclude = feedbackhook.classifier(network)
                patches.append(feedbackhook.patch(network, mode, exclude=exclude, seed=0, **options))
            for number, (half, labels) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                before = {name: buffer.clone() for name, buffer in network.named_buffers()}
                (F.cross_entropy(network(half), labels) / 2).backward()
                if number:  # the first process's statistics are kept
                    for name, buffer in network.named_buffers():
                        buffer.copy_(before[name])

        return replay(batches, backward)

    assert relative_distance(checkpoint["model"], over_halves(rule, **rule_options)) < HALF_OF_FLOAT32
    assert relative_distance(checkpoint["model"], over_halves(None)) > 1e-2
    assert feedbackhook.read(tmp_path / "two")["epoch"].max() == 2

    network, _ = recipe.build("resnet18", 3, "backprop", {}, True, 0)
    network.load_state_dict(checkpoint["model"])
    _, test = recipe.image_folders(root, 32)
    one = recipe.evaluate(Accelerator(cpu=True), network, torch.utils.data.DataLoader(test, 8))
    for name, value in one.items():
        assert checkpoint["metrics"][name] == pytest.approx(value, rel=HALF_OF_FLOAT32), name


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_smoke_run_in_two_processes():
    done = torchrun("--smoke", "true", "--cpu", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert "2 x cpu" in done.stdout
