"""`feedbackhook data check` and `data list`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.datasets import (
    config,
    run,
    shrink,
    truncate,
    write_classes,
    write_mnist,
)
from support.trees import (
    TREES,
    caltech101,
    flowers102,
    mnist,
    stl10,
    svhn,
)

from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.data.verify import check


@pytest.mark.parametrize("name", TREES)
def test_a_check_of_a_whole_dataset_ends_well(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    status, lines = run(capsys, "check", name, "--root", str(tmp_path))
    assert status == 0
    assert lines[-1] == f"{name} is complete: nothing is missing or damaged"
    rows = {line.split()[0]: line.split()[1:3] for line in lines if line.strip()}
    assert rows["train"] == [str(len(set(tree.train))), str(len(tree.train))]
    assert rows["test"] == [str(len(set(tree.test))), str(len(tree.test))]


def test_a_check_names_all_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / ("a long [bold]folder[/bold] :smile: " * 5)
    root.mkdir(parents=True)
    folder = root / caltech101(root, monkeypatch).file
    broken = [folder / "BACKGROUND_Google" / f"image_000{i}.jpg" for i in (1, 2, 3, 4, 5, 6, 7)]
    for path in broken[1:]:
        truncate(path)
    broken[0].write_bytes(b"")
    for path in (folder / "ant").iterdir():
        path.unlink()
    (folder / "wrench" / "image_0001.jpg").unlink()
    (folder / "wrench" / "image_0002.jpg").unlink()
    status, lines = run(capsys, "check", "Caltech101", "--root", str(root))
    assert status == 2
    start = lines.index("Caltech101 has 9 problems:")
    assert lines[start + 1 : start + 3] == [
        f"{folder / 'ant'} contains no images",
        f"{folder / 'wrench'} contains 3 images, 1 too few for the draw",
    ]
    for path, line in zip(broken, lines[start + 3 : start + 10], strict=True):
        assert line.startswith(f"{path} cannot be decoded: ")
    assert lines[-1].startswith(f"What to do: delete {folder}")


def test_a_check_names_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stl10(tmp_path, monkeypatch)
    flowers102(tmp_path, monkeypatch)
    svhn(tmp_path, monkeypatch)
    folder = tmp_path / "stl10_binary"
    (folder / "train_y.bin").unlink()
    truncate(folder / "test_X.bin")
    assert check(config("STL10", tmp_path)).problems == [
        f"{folder / 'train_y.bin'} is missing",
        f"{folder / 'test_X.bin'} is damaged: its MD5 sum is not the published one",
    ]
    jpg = tmp_path / "flowers-102" / "jpg"
    (jpg / "image_00001.jpg").unlink()
    truncate(jpg / "image_00006.jpg")
    faults = check(config("Flowers102", tmp_path)).problems
    assert [fault.partition(" cannot be decoded")[0] for fault in faults] == [
        str(jpg / "image_00001.jpg"),
        str(jpg / "image_00006.jpg"),
    ]
    (tmp_path / "test_32x32.mat").unlink()
    found = check(config("SVHN", tmp_path))
    assert [split.name for split in found.splits] == ["train"]  # what is there is decoded
    assert found.problems == [f"{tmp_path / 'test_32x32.mat'} is missing"]


def test_a_check_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, monkeypatch)
    shrink(monkeypatch, "MNIST", train=21)
    assert check(config("MNIST", tmp_path)).problems == [
        f"{tmp_path / 'MNIST'}: train has 10 classes, 20 images instead of 10 classes, 21 images"
    ]


def test_a_folder_of_images_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    write_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    status, lines = run(capsys, "check", f"imagefolder:{tmp_path}", "--root", "nowhere")
    assert (status, lines[-1].endswith("is complete: nothing is missing or damaged")) == (0, True)
    (tmp_path / "train" / "empty").mkdir()
    truncate(tmp_path / "val" / "cat" / "image_0001.jpg")
    truncate(tmp_path / "train" / "dog" / "image_0002.jpg")
    status, lines = run(capsys, "check", f"imagefolder:{tmp_path}")
    assert status == 2
    faults = lines[lines.index(f"imagefolder:{tmp_path} has 4 problems:") + 1 : -1]
    assert faults[:2] == [
        f"{tmp_path / 'train' / 'empty'} contains no images",
        f"{tmp_path / 'val' / 'empty'} is missing, but {tmp_path / 'train' / 'empty'} exists",
    ]
    assert faults[2].startswith(f"{tmp_path / 'train' / 'dog' / 'image_0002.jpg'} cannot be decoded")
    assert faults[3].startswith(f"{tmp_path / 'val' / 'cat' / 'image_0001.jpg'} cannot be decoded")


def test_another_class_of_torchvision_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    assert run(capsys, "check", "FashionMNIST", "--root", str(tmp_path))[0] == 0
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    truncate(path)
    status, lines = run(capsys, "check", "FashionMNIST", "--root", str(tmp_path))
    assert status == 2
    assert any(line.startswith(f"{path} is damaged: ") for line in lines)


def test_the_list_shows_each_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(capsys, "list")
    assert status == 0
    assert max(map(len, lines)) <= 80
    for dataset in DATASETS.values():
        counts, page = [line for line in lines if line.split()[:1] == [dataset.name]]
        for text in (f"{dataset.train:,}", f"{dataset.test:,}", dataset.paths[0]):
            assert text in counts
        assert page.split() == [dataset.name, dataset.home_page]
        words = " ".join(" ".join(lines).split())
        for text in (dataset.license, *dataset.paths):
            assert text in words
    status, lines = run(capsys, "list", "--json")
    shown = {entry["name"]: entry for entry in json.loads("\n".join(lines))}
    assert [*shown] == [*DATASETS]
    assert shown["LFW-ID"]["downloadable"] is False
    assert shown["Caltech256-101"]["draw"]["exclude"] == ["257.clutter"]
