"""Draws of classes and images: fixed, and refused where others would be drawn."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import (
    Backwards,
    config,
    error,
    run,
    shrink,
)
from support.trees import (
    DRAWN,
    TREES,
    caltech101,
    caltech256,
    lfw,
)

from feedbackhook.experiments.data import readers
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.data.verify import check
from feedbackhook.liao2016 import draws


@pytest.mark.parametrize("name", DRAWN)
def test_a_class_without_images_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    assert tree.folder is not None
    for path in (tmp_path / tree.folder).iterdir():
        path.unlink()
    assert f"{tmp_path / tree.folder} contains no images; delete {tmp_path / tree.file}" in error(
        config(name, tmp_path)
    )


def test_a_class_with_too_few_images_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / caltech101(tmp_path, monkeypatch).file
    (folder / "ant" / "image_0001.jpg").unlink()
    assert f"{folder / 'ant'} contains 3 images, 1 too few for the draw; " in error(
        config("Caltech101", tmp_path)
    )


def test_too_few_classes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / caltech101(tmp_path, monkeypatch).file
    (folder / "BACKGROUND_Google").rename(tmp_path / "elsewhere")
    assert f"{folder} contains 2 classes instead of 3" in error(config("Caltech101", tmp_path))
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    (folder / "A_B" / "0001.jpg").unlink()
    message = f"{folder} contains 3 classes of 3 images or more, 1 too few for the draw"
    assert message in error(config("LFW-ID", tmp_path))


def drawn(name: str, root: Path) -> tuple[set[str], set[str]]:
    sources = readers.find(config(name, root))
    train, test = ({item.name for item in sources.splits[split]} for split in ("train", "test"))
    assert (len(train), len(test)) == tuple(map(len, sources.splits.values()))
    assert not train & test
    return train, test


@pytest.mark.parametrize("name", DRAWN)
def test_a_draw_is_fixed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = tmp_path / "a", tmp_path / "b"
    for root in roots:
        TREES[name](root, monkeypatch)
    first = drawn(name, roots[0])
    np.random.seed(5)
    torch.manual_seed(5)
    with monkeypatch.context() as backwards:
        backwards.setattr(os, "scandir", Backwards)
        assert drawn(name, roots[0]) == first
    moved = tuple({path.replace(str(roots[1]), str(roots[0])) for path in s} for s in drawn(name, roots[1]))
    assert moved == first
    monkeypatch.setattr(draws, "SEED", 1)
    assert drawn(name, roots[0]) != first


def test_a_draw_leaves_out_what_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caltech256(tmp_path, monkeypatch)
    lfw(tmp_path, monkeypatch)
    seen = set()
    for seed in range(20):
        monkeypatch.setattr(draws, "SEED", seed)
        for name in ("Caltech256-101", "LFW-ID"):
            paths = set.union(*drawn(name, tmp_path))
            assert len({Path(path).parent for path in paths}) == DATASETS[name].classes
            seen |= {Path(path).parent.name for path in paths}
    assert seen == {"001.ak47", "002.flag", "003.bat", "004.dog", "A_B", "E_F", "G_H", "K_L"}


WHERE = {"LFW-ID": "lfw-py/lfw_funneled", "Caltech256-101": "caltech256/256_ObjectCategories"}


def know_the_whole(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **known: object) -> None:
    """The registry knows of the made tree what it knows of the published set."""
    folder, dataset = root / WHERE[name], DATASETS[name]
    sources = readers.find(config(name, root))
    assert dataset.draw is not None
    assert sources.folder is not None
    chosen = {
        Path(item.name).relative_to(folder).parts[0] for split in sources.splits.values() for item in split
    }
    known |= {"last_class": draws.ranked(chosen, "")[-1], "folder_images": len(sources.folder)}
    shrink(monkeypatch, name, draw=dataclasses.replace(dataset.draw, **known))


def test_lfw_needs_the_people_with_images_enough_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    whole, splits = drawn("LFW-ID", tmp_path), readers.find(config("LFW-ID", tmp_path)).splits
    know_the_whole("LFW-ID", tmp_path, monkeypatch, digest=draws.digest(splits, folder))
    assert check(config("LFW-ID", tmp_path)).differs == []
    for person in ("C_D", "I_J"):  # who have two and one
        (folder / person).rename(tmp_path / person)
    assert drawn("LFW-ID", tmp_path) == whole
    status, lines = run(capsys, "check", "LFW-ID", "--root", str(tmp_path))
    assert status == 0
    assert lines[-1] == "LFW-ID can be used: nothing that its draw needs is missing or damaged"
    assert lines[-2].rstrip() == (
        f"{folder} contains 4 of the 6 published classes and 13 of the 16 published images; the draw is "
        "the same as from the complete set"
    )


def test_images_that_lack_in_a_class_that_is_drawn_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    splits = readers.find(config("LFW-ID", tmp_path)).splits
    know_the_whole("LFW-ID", tmp_path, monkeypatch, digest=draws.digest(splits, folder))
    [path] = [item.name for item in splits["test"] if "E_F" in item.name]  # one of four
    Path(path).unlink()
    load(config("LFW-ID", tmp_path))
    assert (
        f"LFW-ID: {folder} contains 15 of the 16 published images; the draw has the same classes as from the "
        "complete set, but other images of the classes that lack some"
    ) in caplog.text


def test_a_folder_from_which_others_would_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    shrink(monkeypatch, "LFW-ID", classes=2, train=4, test=2)
    people = {Path(path).parent.name for path in set.union(*drawn("LFW-ID", tmp_path))}
    know_the_whole("LFW-ID", tmp_path, monkeypatch)
    (folder / min(people)).rename(tmp_path / "elsewhere")
    assert "contains 5 classes instead of 6, and lacks some that are drawn from the complete set: " in error(
        config("LFW-ID", tmp_path)
    )


def test_caltech256_needs_the_classes_that_are_drawn_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / caltech256(tmp_path, monkeypatch).file
    whole = drawn("Caltech256-101", tmp_path)
    know_the_whole("Caltech256-101", tmp_path, monkeypatch)
    used = {Path(path).parent.name for path in set.union(*whole)}
    for other in ({"001.ak47", "002.flag", "003.bat", "004.dog"} - used) | {"257.clutter"}:
        (folder / other).rename(tmp_path / other)
    assert drawn("Caltech256-101", tmp_path) == whole
    [line] = check(config("Caltech256-101", tmp_path)).differs
    assert "contains 3 of the 4 published classes and 12 of the 16 published images" in line
    (folder / min(used)).rename(tmp_path / "elsewhere")
    assert "contains 2 classes, 1 too few for the draw" in error(config("Caltech256-101", tmp_path))


def test_what_is_known_of_whole_folders() -> None:
    draws = {name: dataset.draw for name, dataset in DATASETS.items() if dataset.draw is not None}
    assert {name: draw.last_class for name, draw in draws.items() if draw.last_class} == {
        "Caltech256-101": "088.golf-ball",
        "LFW-ID": "Amelie_Mauresmo",
    }
    assert {name: draw.folder_images for name, draw in draws.items() if draw.folder_images} == {
        "Caltech101": 9144,
        "Caltech256-101": 29780,
        "LFW-ID": 13233,
    }
