"""Small trees of files in the published layouts of datasets that torchvision can download, and of LFW."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.io
import torchvision.datasets

from feedbackhook.experiments.data.registry import Draw
from support.datasets import (
    images,
    md5,
    shrink,
    write_classes,
    write_image,
    write_mnist,
)


class Tree(NamedTuple):
    """A made dataset: its labels, what it cannot be opened without, and an image and a class of a folder."""

    train: list[int]
    test: list[int]
    file: str
    image: str | None = None
    folder: str | None = None


def mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    write_mnist(root)
    shrink(monkeypatch, "MNIST", train=20, test=10)
    return Tree([*range(10)] * 2, [*range(10)], "MNIST/raw/t10k-labels-idx1-ubyte")


def write_cifar(folder: Path, name: str, labels: list[int], key: str, seed: int) -> tuple[str, str]:
    folder.mkdir(exist_ok=True)
    content = {"data": images(len(labels), 3072, seed=seed), key: labels}
    (folder / name).write_bytes(pickle.dumps(content))
    return name, md5(folder / name)


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    kind, folder = torchvision.datasets.CIFAR10, root / "cifar-10-batches-py"
    train = [write_cifar(folder, f"data_batch_{k}", [k - 1, k + 4], "labels", k) for k in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [write_cifar(folder, "test_batch", [*range(10)], "labels", 9)])
    write_meta(folder, kind, monkeypatch)
    shrink(monkeypatch, "CIFAR10", train=10, test=10)
    return Tree([0, 5, 1, 6, 2, 7, 3, 8, 4, 9], [*range(10)], "cifar-10-batches-py/data_batch_3")


def cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    kind, folder = torchvision.datasets.CIFAR100, root / "cifar-100-python"
    monkeypatch.setattr(kind, "train_list", [write_cifar(folder, "train", [1, 0, 2], "fine_labels", 1)])
    monkeypatch.setattr(kind, "test_list", [write_cifar(folder, "test", [2, 1, 0], "fine_labels", 2)])
    write_meta(folder, kind, monkeypatch)
    shrink(monkeypatch, "CIFAR100", classes=3, train=3, test=3)
    return Tree([1, 0, 2], [2, 1, 0], "cifar-100-python/meta")


def write_meta(folder: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / kind.meta["filename"]
    path.write_bytes(pickle.dumps({kind.meta["key"]: ["a", "b"]}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(path)})


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    published = dict(torchvision.datasets.SVHN.split_list)
    for split, digits in (("train", [10, 1, 2]), ("test", [2, 10, 1])):
        path = root / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images(32, 32, 3, 3, seed=len(split)), "y": np.array(digits)[:, None]})
        published[split] = [published[split][0], path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", published)
    shrink(monkeypatch, "SVHN", classes=3, train=3, test=3)
    return Tree([0, 1, 2], [2, 0, 1], "train_32x32.mat")  # the digit 0 is class 10 in the file


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    folder, lists = root / "stl10_binary", {"train": [], "test": []}
    folder.mkdir()
    for split, name, content in (
        ("train", "train_X.bin", images(3, 3, 96, 96, seed=1)),
        ("train", "train_y.bin", np.array([1, 2, 3], np.uint8)),
        ("train", "unlabeled_X.bin", images(1, 3, 96, 96, seed=2)),
        ("test", "test_X.bin", images(3, 3, 96, 96, seed=3)),
        ("test", "test_y.bin", np.array([3, 2, 1], np.uint8)),
    ):
        content.tofile(folder / name)
        lists[split].append([name, md5(folder / name)])
    for split, content in lists.items():
        monkeypatch.setattr(torchvision.datasets.STL10, f"{split}_list", content)
    shrink(monkeypatch, "STL10", classes=3, train=3, test=3)
    return Tree([0, 1, 2], [2, 1, 0], "stl10_binary/test_X.bin")


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    folder = root / "flowers-102"
    for i in range(1, 7):
        write_image(folder / "jpg" / f"image_{i:05d}.jpg", i)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    splits = {"trnid": np.array([[1, 4]]), "valid": np.array([[2, 3]]), "tstid": np.array([[6, 5]])}
    scipy.io.savemat(folder / "setid.mat", splits)
    published = dict(torchvision.datasets.Flowers102._file_dict)
    for kind, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        published[kind] = (name, md5(folder / name))
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", published)
    shrink(monkeypatch, "Flowers102", classes=2, train=2, test=2)
    return Tree([0, 1], [1, 0], "flowers-102/setid.mat", "flowers-102/jpg/image_00005.jpg")


def caltech101(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    where = "caltech101/101_ObjectCategories"
    write_classes(root / where, {"BACKGROUND_Google": 7, "ant": 4, "wrench": 5})
    draw = Draw(folder_classes=3, train=3, test=2, min_test=1)
    shrink(monkeypatch, "Caltech101", classes=3, train=9, test=6, draw=draw)
    image = f"{where}/ant/image_0002.jpg"  # of the four all are drawn
    return Tree([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2], where, image, f"{where}/wrench")


def caltech256(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    where = "caltech256/256_ObjectCategories"
    counts = {"001.ak47": 4, "002.flag": 4, "003.bat": 4, "004.dog": 4, "257.clutter": 9}
    write_classes(root / where, counts, "001_{:04d}.jpg")
    write_image(root / where / "004.dog/inside/1.jpg", 0)
    (root / where / "003.bat/README").write_text("no image")
    draw = Draw(folder_classes=4, train=2, test=1, min_test=1, exclude=("257.clutter",))
    shrink(monkeypatch, "Caltech256-101", classes=3, train=6, test=3, draw=draw)
    return Tree([0, 0, 1, 1, 2, 2], [0, 1, 2], where, None, f"{where}/001.ak47")


def lfw(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    where = "lfw-py/lfw_funneled"
    write_classes(root / where, {"A_B": 3, "C_D": 2, "E_F": 4, "G_H": 3, "I_J": 1, "K_L": 3}, "{:04d}.jpg")
    (root / where / "pairs_01.txt").write_text("as in the archive")
    draw = Draw(folder_classes=6, train=2, test=1, min_test=1, large_enough=True)
    shrink(monkeypatch, "LFW-ID", classes=4, train=8, test=4, draw=draw)
    return Tree([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3], where, f"{where}/A_B/0001.jpg", f"{where}/I_J")


TREES: dict[str, Callable[[Path, pytest.MonkeyPatch], Tree]] = {
    "MNIST": mnist,
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "SVHN": svhn,
    "STL10": stl10,
    "Flowers102": flowers102,
    "Caltech101": caltech101,
    "Caltech256-101": caltech256,
    "LFW-ID": lfw,
}


DRAWN = ["Caltech101", "Caltech256-101", "LFW-ID"]
