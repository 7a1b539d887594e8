"""The paper's datasets that torchvision does not read, on small trees of their published layouts, whole and
damaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.io
from support.datasets import (
    Backwards,
    config,
    error,
    images,
    no_decoding,
    run,
    same,
    shrink,
    truncate,
    write_classes,
    write_image,
)

from feedbackhook.experiments.data import readers
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.data.registry import DATASETS, Draw
from feedbackhook.experiments.data.verify import check
from feedbackhook.liao2016 import draws
from feedbackhook.liao2016 import flowers17 as flowers17_reader


class Tree(NamedTuple):
    """A made dataset: its labels, what must be there, and an image that is read."""

    train: list[int]
    test: list[int]
    needed: list[str]
    image: str


def flowers17(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    folder = root / "flowers-17"
    for number in range(1, 13):
        write_image(folder / "jpg" / f"image_{number:04d}.jpg", number)
    splits = {"trn1": [5, 1, 2, 9], "val1": [3, 6, 10], "tst1": [12, 4, 8], "trn2": [7], "tst2": [11]}
    scipy.io.savemat(folder / "datasplits.mat", {name: np.array([v]) for name, v in splits.items()})
    monkeypatch.setattr(flowers17_reader, "IMAGES_PER_CLASS", 4)
    shrink(monkeypatch, "Flowers17", classes=3, train=4, test=3)
    needed = ["flowers-17/jpg", "flowers-17/datasplits.mat"]
    return Tree([0, 0, 1, 2], [0, 1, 2], needed, "flowers-17/jpg/image_0005.jpg")


def indoor67(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    folder = root / "indoorCVPR_09"
    write_classes(folder / "Images", {"bar": 4, "train station": 3}, "room {}.jpg")
    train = ["train station/room 3.jpg", "bar/room 1.jpg", "bar/room 4.jpg"]
    (folder / "TrainImages.txt").write_text("\n".join(train))  # no end of line at the end, as published
    (folder / "TestImages.txt").write_text("bar/room 2.jpg\r\ntrain station/room 1.jpg\r\n")
    shrink(monkeypatch, "MIT-Indoor67", classes=2, train=3, test=2)
    needed = [f"indoorCVPR_09/{name}" for name in ("Images", "TrainImages.txt", "TestImages.txt")]
    return Tree([0, 0, 1], [0, 1], needed, "indoorCVPR_09/Images/bar/room 4.jpg")


def icubworld(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    folder = root / "iCubWorld"
    for k, (category, thing) in enumerate([("bananas", "banana"), ("cans", "tuna")]):
        for instance in (1, 2):
            write_image(
                folder / "train" / category / f"{thing}_{instance}" / "00000001.ppm", 10 * k + instance
            )
        for task in ("categorization", "robot"):
            write_image(folder / "test" / task / category / f"{thing}_3" / "00000001.ppm", 10 * k + 3)
    shrink(monkeypatch, "iCubWorld", classes=2)
    needed = ["iCubWorld/train", "iCubWorld/test/categorization"]
    return Tree([0, 0, 1, 1], [0, 1], needed, "iCubWorld/train/cans/tuna_2/00000001.ppm")


def pubfig83(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    write_classes(root / "pubfig83", {"Adam Sandler": 4, "Alec Baldwin": 3, "Ali Landry": 3}, "{}.jpg")
    draw = Draw(folder_classes=3, train=2, test=1, min_test=1, large_enough=True, min_train=1)
    shrink(monkeypatch, "PubFig83-ID", classes=3, train=6, test=3, draw=draw)
    return Tree([0, 0, 1, 1, 2, 2], [0, 1, 2], ["pubfig83"], "pubfig83/Ali Landry/2.jpg")


def sufr(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    folder = root / "SUFR-W" / "SUFR_in_the_wild"
    people = [1, 2, 1, 3, 2, 1, 3, 2, 3]
    for number in range(1, 10):
        write_image(folder / f"{number}.jpg", number)
    lines = (f"{person} # {'ABC'[person - 1]}. O'Name, Jr" for person in people)
    (folder / "SUFR_in_the_wild_info.txt").write_text("\n".join(lines) + "\n")
    draw = Draw(folder_classes=3, train=2, test=1, min_test=1, large_enough=True, min_train=1)
    shrink(monkeypatch, "SUFR-W-ID", classes=3, train=6, test=3, draw=draw)
    where = "SUFR-W/SUFR_in_the_wild"
    needed = [where, f"{where}/SUFR_in_the_wild_info.txt"]
    return Tree([0, 0, 1, 1, 2, 2], [0, 1, 2], needed, f"{where}/4.jpg")


TREES: dict[str, Callable[[Path, pytest.MonkeyPatch], Tree]] = {
    "iCubWorld": icubworld,
    "Flowers17": flowers17,
    "PubFig83-ID": pubfig83,
    "SUFR-W-ID": sufr,
    "MIT-Indoor67": indoor67,
}
NEEDED = [
    (name, place)
    for name, count in {"iCubWorld": 2, "Flowers17": 2, "SUFR-W-ID": 2, "MIT-Indoor67": 3}.items()
    for place in range(count)
]


def faults(name: str, root: Path) -> list[str]:
    return check(config(name, root)).problems


@pytest.mark.parametrize("name", TREES)
def test_a_dataset_is_read_from_its_published_layout_and_then_from_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    given = config(name, tmp_path, cache=str(tmp_path / "cache"))
    data = load(given)
    assert data.train.labels.tolist() == tree.train
    assert data.test.labels.tolist() == tree.test
    found = check(given)
    assert (found.problems, found.short) == ([], [])
    assert [split.name for split in found.splits] == [
        *(["all"] if name.endswith("-ID") else []),
        "train",
        "test",
    ]
    assert [split.images for split in found.splits[-2:]] == [len(tree.train), len(tree.test)]
    no_decoding(monkeypatch)
    assert same(load(given).train, data.train)


@pytest.mark.parametrize("name", TREES)
def test_what_is_not_there_is_said_with_its_home_page(name: str, tmp_path: Path) -> None:
    message = error(config(name, tmp_path, download=True))
    dataset = DATASETS[name]
    assert f"{name} could not be read: {tmp_path / dataset.paths[0]}" in message
    assert f"; torchvision cannot download it: get it from {dataset.home_page} and set --data.root" in message
    found = check(config(name, tmp_path))
    assert found.splits == []
    assert all(fault.endswith(" is missing") for fault in found.problems)
    assert dataset.home_page in found.hint


@pytest.mark.parametrize(("name", "place"), NEEDED)
def test_a_part_that_is_missing_is_named(
    name: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / TREES[name](tmp_path, monkeypatch).needed[place]
    missing.rename(tmp_path / "elsewhere")
    found = check(config(name, tmp_path))
    if name == "SUFR-W-ID" and place == 0:  # the other part is inside
        assert found.problems == [f"{missing} is missing", f"{missing}/SUFR_in_the_wild_info.txt is missing"]
    else:
        assert found.problems == [f"{missing} is missing"]
        assert found.hint == f"get the missing files from {DATASETS[name].home_page}"
    assert f"{missing} is missing" in error(config(name, tmp_path))


@pytest.mark.parametrize("name", TREES)
def test_an_image_that_is_damaged_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / TREES[name](tmp_path, monkeypatch).image
    truncate(image)
    assert [fault.partition(" cannot be decoded")[0] for fault in faults(name, tmp_path)] == [str(image)]


@pytest.mark.parametrize("name", ["Flowers17", "SUFR-W-ID", "MIT-Indoor67"])
def test_entries_without_an_image_are_named_beside_the_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    gone, listed = tmp_path / tree.image, tmp_path / tree.needed[1]
    gone.unlink()
    other = next(path for path in sorted(gone.parent.glob("*.jpg")) if path.stem[-1] == "1")
    truncate(other)
    first, second = faults(name, tmp_path)
    assert first == f"{gone} is missing, but {listed} lists it"
    assert second.startswith(f"{other} cannot be decoded")
    assert f"{name} could not be read: {first}; " in error(config(name, tmp_path))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "is damaged: "),
        (lambda path: path.write_bytes(b""), "is damaged: "),
        (lambda path: path.write_bytes(b"no matlab" * 40), "is damaged: "),
        (lambda path: scipy.io.savemat(path, {"trn1": [1]}), "is damaged: it does not contain tst1"),
        (
            lambda path: scipy.io.savemat(path, {"trn1": [1], "tst1": [0]}),
            "is damaged: it lists image 0 of 12",
        ),
        (
            lambda path: scipy.io.savemat(path, {"trn1": [13], "tst1": [1]}),
            "is damaged: it lists image 13 of 12",
        ),
        (lambda path: scipy.io.savemat(path, {"trn1": ["a"], "tst1": [1]}), "is damaged: "),
    ],
    ids=["cut", "empty", "foreign", "no split", "zero", "too large", "words"],
)
def test_a_split_of_flowers17_that_is_damaged_is_named(
    damage: Callable[[Path], object], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / flowers17(tmp_path, monkeypatch).needed[1]
    damage(path)
    [fault] = faults("Flowers17", tmp_path)
    assert fault.startswith(f"{path} {what}")
    assert f"{fault}; get Flowers17 again from" in error(config("Flowers17", tmp_path))


def test_lines_that_are_damaged_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / indoor67(tmp_path, monkeypatch).needed[2]
    path.write_text(path.read_text() + "\nbar\n\n/room 1.jpg\n")
    number = len(path.read_text().splitlines())
    assert faults("MIT-Indoor67", tmp_path) == [
        f"{path} is damaged: line {line} is not CLASS/IMAGE" for line in (number - 2, number)
    ]
    path = tmp_path / sufr(tmp_path, monkeypatch).needed[1]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "who", *lines[2:-1]]))
    assert faults("SUFR-W-ID", tmp_path) == [
        f"{path} is damaged: line 2 is not 'ID # NAME'",
        f"{path.parent / '9.jpg'} is not listed in {path}, which ends at line 8",
    ]


def test_a_list_that_is_cut_is_told_by_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / indoor67(tmp_path, monkeypatch).needed[1]
    path.write_text("bar/room 1.jpg\n")
    what = "train has 1 classes, 1 images instead of 2 classes, 3 images"
    assert faults("MIT-Indoor67", tmp_path) == [f"{tmp_path / 'indoorCVPR_09'}: {what}"]


def test_the_classes_of_flowers17_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flowers17(tmp_path, monkeypatch)
    found = readers.find(config("Flowers17", tmp_path)).splits
    names = {split: [(Path(item.name).stem, item.label) for item in items] for split, items in found.items()}
    assert names == {
        "train": [("image_0001", 0), ("image_0002", 0), ("image_0005", 1), ("image_0009", 2)],
        "test": [("image_0004", 0), ("image_0008", 1), ("image_0012", 2)],
    }
    pixels = load(config("Flowers17", tmp_path, size=None)).train.images[2].permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - images(16, 12, 3, seed=5)).mean() < 60  # JPEG of noise
    assert np.abs(pixels.astype(int) - images(16, 12, 3, seed=9)).mean() > 70


def test_the_people_of_sufr_are_those_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sufr(tmp_path, monkeypatch)
    found = readers.find(config("SUFR-W-ID", tmp_path)).splits
    by_label: dict[int | None, set[int]] = {0: set(), 1: set(), 2: set()}
    for item in itertools.chain(*found.values()):
        by_label[item.label].add(int(Path(item.name).stem))
    assert by_label == {0: {1, 3, 6}, 1: {2, 5, 8}, 2: {4, 7, 9}}


def test_the_categories_of_icubworld_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icubworld(tmp_path, monkeypatch)
    test = tmp_path / "iCubWorld" / "test" / "categorization"
    (test / "cans").rename(tmp_path / "elsewhere")
    (test / "bananas" / "banana_3" / "00000001.ppm").unlink()
    train = tmp_path / "iCubWorld" / "train"
    assert faults("iCubWorld", tmp_path)[:2] == [
        f"{test / 'cans'} is missing, but {train / 'cans'} exists",
        f"{test / 'bananas'} contains no images",
    ]


def names(name: str, root: Path) -> dict[str, set[str]]:
    found = readers.find(config(name, root)).splits
    return {split: {item.name.removeprefix(str(root)) for item in items} for split, items in found.items()}


@pytest.mark.parametrize("name", ["PubFig83-ID", "SUFR-W-ID"])
def test_a_draw_is_fixed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = tmp_path / "a", tmp_path / "b"
    for root in roots:
        TREES[name](root, monkeypatch)
    first = names(name, roots[0])
    assert not first["train"] & first["test"]
    with monkeypatch.context() as backwards:
        backwards.setattr("os.scandir", Backwards)
        assert names(name, roots[0]) == first
    assert names(name, roots[1]) == first
    others = []
    for seed in range(1, 6):
        monkeypatch.setattr(draws, "SEED", seed)
        others.append(names(name, roots[0]))
    assert any(other != first for other in others)


def test_what_is_left_of_a_small_class_is_used_and_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / pubfig83(tmp_path, monkeypatch).needed[0]
    (folder / "Alec Baldwin" / "2.jpg").unlink()
    given = config("PubFig83-ID", tmp_path, cache=str(tmp_path / "cache"))
    for _ in range(2):  # from the cache, too
        caplog.clear()
        assert load(given).train.labels.bincount().tolist() == [2, 1, 2]
        assert load(given).test.labels.bincount().tolist() == [1, 1, 1]
        assert "PubFig83-ID: some classes have fewer samples than are drawn: 5 instead of 6 for training" in (
            caplog.text
        )
    status, lines = run(capsys, "check", "PubFig83-ID", "--root", str(tmp_path))
    assert status == 0
    what = "contains 2 images: 1 for training instead of 2, 1 for testing instead of 1"
    assert f"{folder / 'Alec Baldwin'} {what}" in [line.rstrip() for line in lines]
    (folder / "Alec Baldwin" / "1.jpg").unlink()
    message = error(config("PubFig83-ID", tmp_path))
    assert f"{folder} contains 2 classes of 2 images or more, 1 too few for the draw" in message


def test_classes_that_have_enough_are_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / pubfig83(tmp_path, monkeypatch).needed[0]
    (folder / "Alec Baldwin" / "2.jpg").unlink()
    draw = DATASETS["PubFig83-ID"].draw
    shrink(monkeypatch, "PubFig83-ID", classes=2, train=4, test=2, draw=draw)
    for seed in range(8):
        monkeypatch.setattr(draws, "SEED", seed)
        assert not any("Alec" in name for name in names("PubFig83-ID", tmp_path)["train"])
    assert check(config("PubFig83-ID", tmp_path)).short == []


def test_what_is_not_the_papers_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = [name for name, dataset in DATASETS.items() if dataset.note]
    assert noted == ["iCubWorld", "Flowers17", "TIMIT-80"]
    words = " ".join(run(capsys, "list")[1])
    for name in noted:
        assert f"{name}: {DATASETS[name].note}" in words
    icubworld(tmp_path, monkeypatch)
    status, lines = run(capsys, "check", "iCubWorld", "--root", str(tmp_path))
    assert status == 0
    assert f"Note: {DATASETS['iCubWorld'].note}" in [line.rstrip() for line in lines]
    assert any("2 classes, about 2,001 images" in line for line in lines)


def test_sufr_needs_its_whole_list_and_the_images_that_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / sufr(tmp_path, monkeypatch).needed[0]
    draw = Draw(folder_classes=3, train=1, test=1, min_test=1, large_enough=True, min_train=1)
    shrink(monkeypatch, "SUFR-W-ID", classes=2, train=2, test=2, draw=draw)
    whole = names("SUFR-W-ID", tmp_path)
    used = {Path(name).name for split in whole.values() for name in split}
    others = [path for path in sorted(folder.glob("*.jpg")) if path.name not in used]
    assert len(others) == 5
    for path in others:
        path.unlink()
    assert names("SUFR-W-ID", tmp_path) == whole
    found = check(config("SUFR-W-ID", tmp_path))
    assert found.problems == []
    assert found.differs == [
        f"{folder} contains 4 of the 9 images that SUFR_in_the_wild_info.txt lists; the draw is the same as "
        "from the complete set"
    ]
    (folder / min(used)).unlink()
    assert faults("SUFR-W-ID", tmp_path) == [
        f"{folder / min(used)} is missing, but {folder / 'SUFR_in_the_wild_info.txt'} lists it"
    ]


def test_pubfig83_needs_all_its_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who of them are drawn follows from all their counts, which nothing published says."""
    folder = tmp_path / pubfig83(tmp_path, monkeypatch).needed[0]
    shrink(monkeypatch, "PubFig83-ID", classes=2, train=4, test=2)
    (folder / "Ali Landry").rename(tmp_path / "elsewhere")
    assert faults("PubFig83-ID", tmp_path) == [f"{folder} contains 2 classes instead of 3"]
