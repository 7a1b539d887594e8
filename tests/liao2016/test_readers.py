"""The paper's datasets that torchvision can download, and LFW, on small trees of files, whole and damaged."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from support.datasets import (
    SIZE,
    config,
    error,
    images,
    truncate,
)
from support.trees import (
    DRAWN,
    TREES,
    caltech256,
    cifar10,
    cifar100,
    mnist,
    svhn,
)

from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.data.verify import check
from feedbackhook.liao2016.datasets import DATASETS as OF_THE_PAPER
from feedbackhook.liao2016.networks import NETWORKS
from feedbackhook.liao2016.published import DATASETS as NAMES
from feedbackhook.liao2016.published import error_rates

DATASETS = {dataset.name: dataset for dataset in OF_THE_PAPER}


def test_the_registry_has_the_published_counts() -> None:
    counts = {name: (d.classes, d.train, d.test) for name, d in DATASETS.items()}
    assert counts == {
        "MNIST": (10, 60000, 10000),
        "CIFAR10": (10, 50000, 10000),
        "CIFAR100": (100, 50000, 10000),
        "SVHN": (10, 73257, 26032),
        "STL10": (10, 5000, 8000),
        "Caltech101": (102, 3060, 1020),
        "Caltech256-101": (102, 3060, 1020),
        "iCubWorld": (10, 6000, 2001),
        "Flowers17": (17, 680, 340),
        "Flowers102": (102, 1020, 6149),
        "PubFig83-ID": (80, 6800, 1200),
        "SUFR-W-ID": (80, 800, 400),
        "LFW-ID": (80, 800, 400),
        "MIT-Indoor67": (67, 5360, 1340),
        "TIMIT-80": (61, 24400, 6100),
    }
    assert [NAMES.get(name, name) for name in error_rates()] == [*DATASETS]
    for dataset in DATASETS.values():
        assert dataset.network in NETWORKS
        if dataset.draw is not None:
            assert dataset.train == dataset.classes * dataset.draw.train
            assert dataset.test == dataset.classes * dataset.draw.test
            assert dataset.classes <= dataset.draw.folder_classes
    fewer = ["PubFig83-ID", "SUFR-W-ID", "TIMIT-80"]
    assert [name for name, d in DATASETS.items() if d.test_at_most] == ["Caltech101", *fewer]
    assert [name for name, d in DATASETS.items() if d.train_at_most] == fewer
    assert [name for name, d in DATASETS.items() if d.approximate] == ["iCubWorld"]


@pytest.mark.parametrize("name", TREES)
def test_a_dataset_is_read_from_its_published_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    data = load(config(name, tmp_path))
    assert data.train.labels.tolist() == tree.train
    assert data.test.labels.tolist() == tree.test
    assert data.train.images.shape[1:] == (1 if name == "MNIST" else 3, SIZE, SIZE)
    found = check(config(name, tmp_path))
    assert found.problems == []
    assert [split.name for split in found.splits] == [*(["all"] if name in DRAWN else []), "train", "test"]


def test_the_pixels_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path, monkeypatch)
    svhn(tmp_path, monkeypatch)
    data = load(config("CIFAR10", tmp_path, size=None))
    assert np.array_equal(data.test.images.numpy().reshape(10, -1), images(10, 3072, seed=9))
    data = load(config("SVHN", tmp_path, size=None))
    assert np.array_equal(data.train.images.permute(2, 3, 1, 0).numpy(), images(32, 32, 3, 3, seed=5))


@pytest.mark.parametrize("name", TREES)
def test_a_file_that_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    (tmp_path / tree.file).rename(tmp_path / "elsewhere")
    assert f"{name} could not be read: {tmp_path / tree.file} is missing; " in error(config(name, tmp_path))
    hint = "torchvision cannot download it: get it from" if name == "LFW-ID" else "--data.download true"
    assert hint in error(config(name, tmp_path))
    assert check(config(name, tmp_path)).problems == [f"{tmp_path / tree.file} is missing"]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10", "Flowers102"])
def test_a_file_that_is_damaged_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / TREES[name](tmp_path, monkeypatch).file
    path.write_bytes(path.read_bytes()[:-3])
    fault = f"{path} is damaged: " + ("" if name == "MNIST" else "its MD5 sum is not the published one")
    assert f"{name} could not be read: {fault}" in error(config(name, tmp_path))
    assert [found.startswith(fault) for found in check(config(name, tmp_path)).problems] == [True]


def test_labels_that_are_too_few_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, monkeypatch)
    header = struct.pack(">ii", 0x801, 7)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(7))
    fault = f"{tmp_path / 'MNIST'} (test) has 10 images but 7 labels"
    assert fault in error(config("MNIST", tmp_path))
    assert check(config("MNIST", tmp_path)).problems == [fault]


@pytest.mark.parametrize("name", ["Flowers102", "Caltech101", "LFW-ID"])
def test_an_image_that_is_damaged_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    assert tree.image is not None
    truncate(tmp_path / tree.image)
    assert f"{tmp_path / tree.image} cannot be decoded: image file is truncated" in error(
        config(name, tmp_path)
    )


class Exploit:
    """Its unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (self.mark,)


def test_a_batch_that_was_tampered_with_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10(tmp_path, monkeypatch)
    cifar100(tmp_path, monkeypatch)
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists()
    mark.unlink()
    for name, path in (
        ("CIFAR10", tmp_path / "cifar-10-batches-py" / "data_batch_1"),
        ("CIFAR100", tmp_path / "cifar-100-python" / "meta"),
    ):
        path.write_bytes(pickle.dumps(Exploit(mark)))
        assert f"{path} is damaged: its MD5 sum" in error(config(name, tmp_path))
        assert [str(path) in fault for fault in check(config(name, tmp_path)).problems] == [True]
    assert not mark.exists()


def test_old_files_of_mnist_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, monkeypatch)
    folder, mark = tmp_path / "MNIST" / "processed", tmp_path / "mark"
    folder.mkdir()
    torch.save((torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10)), folder / "test.pt")
    torch.save(Exploit(mark), folder / "training.pt")
    assert f"{folder / 'training.pt'} is damaged: it contains more than tensors" in error(
        config("MNIST", tmp_path)
    )
    assert len(check(config("MNIST", tmp_path)).problems) == 1
    assert not mark.exists()


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fail)
    monkeypatch.setattr(torchvision.datasets.caltech, "download_and_extract_archive", fail)
    for name in ("MNIST", "Caltech101", "Caltech256-101"):
        message = error(config(name, tmp_path, download=True))
        assert "is missing" in message
        assert message.endswith("did not help (no route to host)")


def test_a_dataset_that_is_drawn_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = caltech256(tmp_path / "publisher", monkeypatch)

    def download(_: object) -> None:
        (tmp_path / "publisher" / tree.file).rename(tmp_path / tree.file)

    monkeypatch.setattr(torchvision.datasets.Caltech256, "download", download)
    for _ in range(2):
        assert load(config("Caltech256-101", tmp_path, download=True)).train.labels.tolist() == tree.train
