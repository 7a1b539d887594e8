"""The errors of the ImageNet recipe say what is wrong."""

from pathlib import Path

import pytest
from support.imagenet import LR, SMALL, make_tree, train

import feedbackhook


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
        r"12 images are directly in .*val,.*n01440764.*devkit.*ImageNet\('.*images', 'val'\)",
    ),
    half_sorted_val: (ValueError, "1 images are directly in .*val,"),
    flat_train: (ValueError, "1 images are directly in .*train; each must be in the folder of its class"),
    archives: (ValueError, r"train holds 3 archives \(.tar\): unpack each"),
    no_classes: (FileNotFoundError, "train holds no class folders"),
    other_classes: (ValueError, "val lacks 1 class folders that .*train has: n00000002"),
    a_class_too_few: (ValueError, "train lacks 1 class folders that .*val has: n00000002"),
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
        "no folder nowhere/train: set --root to the folder",
    ),
    "epochs": ({"epochs": 0}, ValueError, "--epochs must be 1 or more"),
    "seed": ({"seed": -1}, ValueError, "--seed must be 0 or more"),
    "batch": ({"batch_size": 25}, ValueError, "a batch of 25 is larger than the 24 images"),
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
    with pytest.raises(ValueError, match=r"with rule backprop, not sign-symmetry.*choose another --output"):
        train(recipe, root, output, model=SMALL)
    with pytest.raises(ValueError, match=rf"with lr {LR}, not 0.5"):
        train(recipe, root, output, rule="backprop", model=SMALL, lr=0.5)
    path = output / "checkpoint.pt"
    for content in (b"", b"not a checkpoint", path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .* choose another --output"):
            train(recipe, root, output, rule="backprop", model=SMALL)


def test_a_run_that_diverges_says_so_and_keeps_its_table(recipe, tmp_path):
    root, output = make_tree(tmp_path / "images"), tmp_path / "run"
    with pytest.raises(FloatingPointError, match="train_loss is nan in epoch 1: this run diverges"):
        train(recipe, root, output, rule="backprop", model=SMALL, lr=1e30)
    table = feedbackhook.read(output)
    assert table.loc[table["metric"] == "train_loss", "value"].isna().all()
    assert not (output / "checkpoint.pt").exists()
