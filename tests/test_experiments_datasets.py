"""The paper's datasets on small trees of the published layouts, whole and damaged; the cache; GPU memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch
import torchvision.datasets
from bounds import HANG
from PIL import Image
from test_experiments_data import images, write_mnist
from torch._subclasses import FakeTensorMode

from feedbackhook.cli import main
from feedbackhook.experiments import data_cache, data_folders, data_sources, datasets
from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data import ImageData, Split, load
from feedbackhook.experiments.data_check import check
from feedbackhook.experiments.networks import NETWORKS
from feedbackhook.report.tables import paper_errors

SIZE = 8


class Tree(NamedTuple):
    """A made dataset: its labels, what it cannot be opened without, and an image and a class of a folder."""

    train: list[int]
    test: list[int]
    file: str
    image: str | None = None
    folder: str | None = None


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images(16, 12, 3, seed=seed)).save(path)


def write_classes(folder: Path, counts: dict[str, int], name: str = "image_{:04d}.jpg") -> None:
    for k, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            write_image(folder / label / name.format(i + 1), 100 * k + i)


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    monkeypatch.setitem(datasets.PAPER, name, dataclasses.replace(datasets.PAPER[name], **changes))


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
    draw = datasets.Draw(of=3, train=3, test=2, least_test=1)
    shrink(monkeypatch, "Caltech101", classes=3, train=9, test=6, draw=draw)
    image = f"{where}/ant/image_0002.jpg"  # of the four all are drawn
    return Tree([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2], where, image, f"{where}/wrench")


def caltech256(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    where = "caltech256/256_ObjectCategories"
    counts = {"001.ak47": 4, "002.flag": 4, "003.bat": 4, "004.dog": 4, "257.clutter": 9}
    write_classes(root / where, counts, "001_{:04d}.jpg")
    write_image(root / where / "004.dog/inside/1.jpg", 0)
    (root / where / "003.bat/README").write_text("no image")
    draw = datasets.Draw(of=4, train=2, test=1, least_test=1, without=("257.clutter",))
    shrink(monkeypatch, "Caltech256-101", classes=3, train=6, test=3, draw=draw)
    return Tree([0, 0, 1, 1, 2, 2], [0, 1, 2], where, None, f"{where}/001.ak47")


def lfw(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    where = "lfw-py/lfw_funneled"
    write_classes(root / where, {"A_B": 3, "C_D": 2, "E_F": 4, "G_H": 3, "I_J": 1, "K_L": 3}, "{:04d}.jpg")
    (root / where / "pairs_01.txt").write_text("as in the archive")
    draw = datasets.Draw(of=6, train=2, test=1, least_test=1, large_enough=True)
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


def config(name: str, root: Path, **changes: object) -> DataConfig:
    return dataclasses.replace(DataConfig(name, root=str(root), size=SIZE), **changes)


def error(given: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load(given)
    return str(caught.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def same(first: Split, second: Split) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_the_registry_has_the_published_counts() -> None:
    counts = {name: (d.classes, d.train, d.test) for name, d in datasets.PAPER.items()}
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
    assert list(paper_errors()) == [dataset.paper_name for dataset in datasets.PAPER.values()]
    for dataset in datasets.PAPER.values():
        assert dataset.network in NETWORKS
        if dataset.draw is not None:
            assert dataset.train == dataset.classes * dataset.draw.train
            assert dataset.test == dataset.classes * dataset.draw.test
            assert dataset.classes <= dataset.draw.of
    fewer = ["PubFig83-ID", "SUFR-W-ID", "TIMIT-80"]
    assert [name for name, d in datasets.PAPER.items() if d.test_at_most] == ["Caltech101", *fewer]
    assert [name for name, d in datasets.PAPER.items() if d.train_at_most] == fewer
    assert [name for name, d in datasets.PAPER.items() if d.about] == ["iCubWorld"]


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
    assert found.faults == []
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
    way_out = "torchvision cannot download it; fetch it from" if name == "LFW-ID" else "--data.download true"
    assert way_out in error(config(name, tmp_path))
    assert check(config(name, tmp_path)).faults == [f"{tmp_path / tree.file} is missing"]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10", "Flowers102"])
def test_a_file_that_is_damaged_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / TREES[name](tmp_path, monkeypatch).file
    path.write_bytes(path.read_bytes()[:-3])
    fault = f"{path} is damaged: " + ("" if name == "MNIST" else "its MD5 sum is not the published one")
    assert f"{name} could not be read: {fault}" in error(config(name, tmp_path))
    assert [found.startswith(fault) for found in check(config(name, tmp_path)).faults] == [True]


def test_labels_that_are_too_few_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, monkeypatch)
    header = struct.pack(">ii", 0x801, 7)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(7))
    fault = f"{tmp_path / 'MNIST'} (test) holds 10 images and 7 labels"
    assert fault in error(config("MNIST", tmp_path))
    assert check(config("MNIST", tmp_path)).faults == [fault]


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


@pytest.mark.parametrize("name", DRAWN)
def test_a_class_without_images_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    assert tree.folder is not None
    for path in (tmp_path / tree.folder).iterdir():
        path.unlink()
    assert f"{tmp_path / tree.folder} holds no images; take {tmp_path / tree.file} away" in error(
        config(name, tmp_path)
    )


def test_a_class_with_too_few_images_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / caltech101(tmp_path, monkeypatch).file
    (folder / "ant" / "image_0001.jpg").unlink()
    assert f"{folder / 'ant'} holds 3 images, 1 fewer than are drawn; " in error(
        config("Caltech101", tmp_path)
    )


def test_too_few_classes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / caltech101(tmp_path, monkeypatch).file
    (folder / "BACKGROUND_Google").rename(tmp_path / "elsewhere")
    assert f"{folder} holds 2 classes in the place of 3" in error(config("Caltech101", tmp_path))
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    (folder / "A_B" / "0001.jpg").unlink()
    message = f"{folder} holds 3 classes of 3 images or more, 1 fewer than are drawn"
    assert message in error(config("LFW-ID", tmp_path))


def drawn(name: str, root: Path) -> tuple[set[str], set[str]]:
    sources = data_sources.find(config(name, root))
    train, test = ({item.name for item in sources.splits[split]} for split in ("train", "test"))
    assert (len(train), len(test)) == tuple(map(len, sources.splits.values()))
    assert not train & test
    return train, test


class Backwards:
    """os.scandir, its entries in the opposite order."""

    scandir = os.scandir

    def __init__(self, path: str) -> None:
        with Backwards.scandir(path) as entries:
            self.entries = iter([*entries][::-1])

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self.entries

    def __next__(self) -> os.DirEntry[str]:
        return next(self.entries)

    def __enter__(self) -> Backwards:
        return self

    def __exit__(self, *_: object) -> None:
        pass


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
    monkeypatch.setattr(data_folders, "_DRAW_SEED", 1)
    assert drawn(name, roots[0]) != first


def test_a_draw_leaves_out_what_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caltech256(tmp_path, monkeypatch)
    lfw(tmp_path, monkeypatch)
    seen = set()
    for seed in range(20):
        monkeypatch.setattr(data_folders, "_DRAW_SEED", seed)
        for name in ("Caltech256-101", "LFW-ID"):
            paths = set.union(*drawn(name, tmp_path))
            assert len({Path(path).parent for path in paths}) == datasets.PAPER[name].classes
            seen |= {Path(path).parent.name for path in paths}
    assert seen == {"001.ak47", "002.flag", "003.bat", "004.dog", "A_B", "E_F", "G_H", "K_L"}


WHERE = {"LFW-ID": "lfw-py/lfw_funneled", "Caltech256-101": "caltech256/256_ObjectCategories"}


def know_the_whole(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **known: object) -> None:
    """The registry knows of the made tree what it knows of the published set."""
    folder, dataset = root / WHERE[name], datasets.PAPER[name]
    sources = data_sources.find(config(name, root))
    assert dataset.draw is not None
    assert sources.folder is not None
    chosen = {
        Path(item.name).relative_to(folder).parts[0] for split in sources.splits.values() for item in split
    }
    known |= {"last": data_folders.ranked(chosen, "")[-1], "images": len(sources.folder)}
    shrink(monkeypatch, name, draw=dataclasses.replace(dataset.draw, **known))


def test_lfw_needs_the_people_with_images_enough_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    whole, splits = drawn("LFW-ID", tmp_path), data_sources.find(config("LFW-ID", tmp_path)).splits
    know_the_whole("LFW-ID", tmp_path, monkeypatch, digest=data_folders.digest(splits, folder))
    assert check(config("LFW-ID", tmp_path)).differs == []
    for person in ("C_D", "I_J"):  # who have two and one
        (folder / person).rename(tmp_path / person)
    assert drawn("LFW-ID", tmp_path) == whole
    status, lines = run(capsys, "check", "LFW-ID", "--root", str(tmp_path))
    assert status == 0
    assert lines[-1] == "LFW-ID can be used: nothing that its draw needs is missing or damaged"
    assert lines[-2].rstrip() == (
        f"{folder} holds 4 of the 6 classes and 13 of the 16 images that were published; what is drawn is "
        "the same as from the whole set"
    )


def test_images_that_lack_in_a_class_that_is_drawn_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    splits = data_sources.find(config("LFW-ID", tmp_path)).splits
    know_the_whole("LFW-ID", tmp_path, monkeypatch, digest=data_folders.digest(splits, folder))
    [path] = [item.name for item in splits["test"] if "E_F" in item.name]  # one of four
    Path(path).unlink()
    load(config("LFW-ID", tmp_path))
    assert (
        f"LFW-ID: {folder} holds 15 of the 16 images that were published; the classes that are drawn are "
        "those of the whole set; from a class that lacks images, others are drawn"
    ) in caplog.text


def test_a_folder_from_which_others_would_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / lfw(tmp_path, monkeypatch).file
    shrink(monkeypatch, "LFW-ID", classes=2, train=4, test=2)
    people = {Path(path).parent.name for path in set.union(*drawn("LFW-ID", tmp_path))}
    know_the_whole("LFW-ID", tmp_path, monkeypatch)
    (folder / min(people)).rename(tmp_path / "elsewhere")
    assert "holds 5 classes in the place of 6, and not all that are drawn from the whole set: " in error(
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
    assert "holds 3 of the 4 classes and 12 of the 16 images that were published" in line
    (folder / min(used)).rename(tmp_path / "elsewhere")
    assert "holds 2 classes, 1 fewer than are drawn" in error(config("Caltech256-101", tmp_path))


def test_what_is_known_of_whole_folders() -> None:
    draws = {name: dataset.draw for name, dataset in datasets.PAPER.items() if dataset.draw is not None}
    assert {name: draw.last for name, draw in draws.items() if draw.last} == {
        "Caltech256-101": "088.golf-ball",
        "LFW-ID": "Amelie_Mauresmo",
    }
    assert {name: draw.images for name, draw in draws.items() if draw.images} == {
        "Caltech101": 9144,
        "Caltech256-101": 29780,
        "LFW-ID": 13233,
    }


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
        assert [str(path) in fault for fault in check(config(name, tmp_path)).faults] == [True]
    assert not mark.exists()


def test_old_files_of_mnist_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, monkeypatch)
    folder, mark = tmp_path / "MNIST" / "processed", tmp_path / "mark"
    folder.mkdir()
    torch.save((torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10)), folder / "test.pt")
    torch.save(Exploit(mark), folder / "training.pt")
    assert f"{folder / 'training.pt'} is damaged: it holds other things than tensors" in error(
        config("MNIST", tmp_path)
    )
    assert len(check(config("MNIST", tmp_path)).faults) == 1
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


# ------------------------------------------------------------------------------------------ data check, list


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(["data", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return status, printed.out.splitlines()


@pytest.mark.parametrize("name", TREES)
def test_a_check_of_a_whole_dataset_ends_well(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES[name](tmp_path, monkeypatch)
    status, lines = run(capsys, "check", name, "--root", str(tmp_path))
    assert status == 0
    assert lines[-1] == f"{name} is whole: nothing is missing or damaged"
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
    start = lines.index("Caltech101 has 9 faults:")
    assert lines[start + 1 : start + 3] == [
        f"{folder / 'ant'} holds no images",
        f"{folder / 'wrench'} holds 3 images, 1 fewer than are drawn",
    ]
    for path, line in zip(broken, lines[start + 3 : start + 10], strict=True):
        assert line.startswith(f"{path} cannot be decoded: ")
    assert lines[-1].startswith(f"What to do: take {folder} away")


def test_a_check_names_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stl10(tmp_path, monkeypatch)
    flowers102(tmp_path, monkeypatch)
    svhn(tmp_path, monkeypatch)
    folder = tmp_path / "stl10_binary"
    (folder / "train_y.bin").unlink()
    truncate(folder / "test_X.bin")
    assert check(config("STL10", tmp_path)).faults == [
        f"{folder / 'train_y.bin'} is missing",
        f"{folder / 'test_X.bin'} is damaged: its MD5 sum is not the published one",
    ]
    jpg = tmp_path / "flowers-102" / "jpg"
    (jpg / "image_00001.jpg").unlink()
    truncate(jpg / "image_00006.jpg")
    faults = check(config("Flowers102", tmp_path)).faults
    assert [fault.partition(" cannot be decoded")[0] for fault in faults] == [
        str(jpg / "image_00001.jpg"),
        str(jpg / "image_00006.jpg"),
    ]
    (tmp_path / "test_32x32.mat").unlink()
    found = check(config("SVHN", tmp_path))
    assert [split.name for split in found.splits] == ["train"]  # what is there is decoded
    assert found.faults == [f"{tmp_path / 'test_32x32.mat'} is missing"]


def test_a_check_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, monkeypatch)
    shrink(monkeypatch, "MNIST", train=21)
    assert check(config("MNIST", tmp_path)).faults == [
        f"{tmp_path / 'MNIST'}: train holds 10 classes, 20 images in the place of 10 classes, 21 images"
    ]


def test_a_folder_of_images_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2})
    write_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    status, lines = run(capsys, "check", f"imagefolder:{tmp_path}", "--root", "nowhere")
    assert (status, lines[-1].endswith("is whole: nothing is missing or damaged")) == (0, True)
    (tmp_path / "train" / "empty").mkdir()
    truncate(tmp_path / "val" / "cat" / "image_0001.jpg")
    truncate(tmp_path / "train" / "dog" / "image_0002.jpg")
    status, lines = run(capsys, "check", f"imagefolder:{tmp_path}")
    assert status == 2
    faults = lines[lines.index(f"imagefolder:{tmp_path} has 4 faults:") + 1 : -1]
    assert faults[:2] == [
        f"{tmp_path / 'train' / 'empty'} holds no images",
        f"{tmp_path / 'val' / 'empty'} is missing; {tmp_path / 'train' / 'empty'} is there",
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
    for dataset in datasets.PAPER.values():
        counts, page = [line for line in lines if line.split()[:1] == [dataset.name]]
        for text in (f"{dataset.train:,}", f"{dataset.test:,}", dataset.where[0]):
            assert text in counts
        assert page.split() == [dataset.name, dataset.source]
        words = " ".join(" ".join(lines).split())
        for text in (dataset.licence, *dataset.where):
            assert text in words
    status, lines = run(capsys, "list", "--json")
    shown = {entry["name"]: entry for entry in json.loads("\n".join(lines))}
    assert [*shown] == [*datasets.PAPER]
    assert shown["LFW-ID"]["downloads"] is False
    assert shown["Caltech256-101"]["draw"]["without"] == ["257.clutter"]


# ------------------------------------------------------------------------------------------------- the cache


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a source is read")

    monkeypatch.setattr(data_sources, "find", fail)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "test")):
        write_classes(tmp_path / "images" / split, {"cat": 2, "dog": 2}, f"{seed}_{{}}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", TREES)
def test_a_second_load_reads_no_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TREES[name](tmp_path, monkeypatch)
    given = config(name, tmp_path, cache=str(tmp_path / "cache"))
    first = load(given)
    no_decoding(monkeypatch)
    second = load(given)
    assert same(first.train, second.train)
    assert same(first.test, second.test)
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    with pytest.raises(AssertionError, match="a source is read"):
        load(dataclasses.replace(given, size=SIZE + 1))


def test_a_hit_is_mapped_into_memory(folder: Path, tmp_path: Path) -> None:
    given = config(f"imagefolder:{folder}", tmp_path, cache=str(tmp_path / "cache"))
    load(given)
    kept = load(given)
    assert str(tmp_path / "cache") in Path("/proc/self/maps").read_text()
    assert kept.train.images.dtype == torch.uint8


def test_sources_that_change_are_read_again(folder: Path, tmp_path: Path) -> None:
    given = config(f"imagefolder:{folder}", tmp_path, cache=str(tmp_path / "cache"))
    path = folder / "train" / "cat" / "0_1.png"
    first, before = load(given), path.stat()
    Image.fromarray(np.zeros((16, 12, 3), np.uint8)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its size alone tells
    assert load(given).train.images[0].eq(0).all()
    content = path.read_bytes()
    write_image(path, 0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(load(given).train, first.train)
    path.write_bytes(b"\0" * path.stat().st_size)  # its time alone tells
    assert f"{path} cannot be decoded" in error(given)
    path.unlink()
    assert len(load(given).train.labels) == 3
    path.write_bytes(content)
    assert len(load(given).train.labels) == 4
    assert len([*(tmp_path / "cache").iterdir()]) == 1  # what is out of date is not kept


def test_a_file_that_moves_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for split in ("train", "test"):
        write_classes(folder / split, {"cat": 2, "dog": 2}, "{}.bmp")
    for path in folder.rglob("*.bmp"):  # all of one size
        os.utime(path, ns=(0, 0))
    given = config(f"imagefolder:{folder}", tmp_path, cache=str(tmp_path / "cache"))
    assert load(given).train.labels.tolist() == [0, 0, 1, 1]
    (folder / "train" / "dog" / "1.bmp").rename(folder / "train" / "cat" / "3.bmp")
    assert load(given).train.labels.tolist() == [0, 0, 0, 1]


def test_a_cache_that_cannot_be_written_whole_is_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    given = config(f"imagefolder:{folder}", tmp_path, cache=str(tmp_path / "cache"))
    assert load(given).classes == 2
    assert "decoded images are not kept for the next run: no space left" in caplog.text
    assert [*(tmp_path / "cache").iterdir()] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: b"no cache" * 99,
    ],
    ids=["cut", "empty", "one bit", "foreign"],
)
def test_a_damaged_cache_is_rebuilt(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    given = config(f"imagefolder:{folder}", tmp_path, cache=str(tmp_path / "cache"))
    first = load(given)
    [path] = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert same(load(given).train, first.train)
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    assert same(load(given).train, first.train)
    assert caplog.text == ""


def test_the_cache_is_where_it_should_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = config(f"imagefolder:{folder}", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load(dataclasses.replace(given, cache="none"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]
    load(given)
    assert len([*(tmp_path / "xdg" / "feedbackhook").iterdir()]) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    load(given)
    assert len([*(tmp_path / "home" / ".cache" / "feedbackhook").iterdir()]) == 1
    (tmp_path / "file").touch()
    load(dataclasses.replace(given, cache=str(tmp_path / "file" / "cache")))
    assert "decoded images are not kept" in caplog.text


def test_a_download_is_cached_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_: object) -> None:
        if not (tmp_path / "MNIST").exists():
            mnist(tmp_path, monkeypatch)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    given = config("MNIST", tmp_path, cache=str(tmp_path / "cache"), download=True)
    load(given)
    no_decoding(monkeypatch)
    assert load(given).classes == 10


def load_together(given: DataConfig, barrier: object, results: object) -> None:
    stored = data_cache._store
    data_cache._store = lambda *a: (barrier.wait(HANG), stored(*a))  # both have decoded, none has written
    results.put(load(given).train.images.numpy().tobytes())


def test_two_processes_that_build_at_once_end_right(folder: Path, tmp_path: Path) -> None:
    given = config(f"imagefolder:{folder}", tmp_path, cache=str(tmp_path / "cache"))
    expected = load(dataclasses.replace(given, cache="none")).train.images.numpy().tobytes()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=load_together, args=(given, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=HANG) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join(HANG)
        assert worker.exitcode == 0
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    assert load(given).train.images.numpy().tobytes() == expected


def test_data_of_unknown_files_are_not_cached(tmp_path: Path) -> None:
    load(config("FakeData", tmp_path, cache=str(tmp_path / "cache")))
    load(DataConfig(cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------ in a GPU's memory


def bytes_of(data: ImageData) -> int:
    splits = [data.train, data.test, *([data.held_out] if data.held_out else [])]
    return sum(t.numel() * t.element_size() for split in splits for t in split)


@pytest.mark.parametrize("held_out", [0.0, 0.1])
def test_images_move_to_a_gpu_where_there_is_room(held_out: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(DataConfig(held_out=held_out))
    device, needed = torch.device("cuda"), bytes_of(data)
    for free, where in ((2 * needed, "cuda"), (2 * needed - 2, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
        with FakeTensorMode(allow_non_fake_inputs=True):  # as if there were a GPU, without its values
            moved = data.to(device)
            splits = [s for s in (moved.train, moved.test, moved.held_out) if s is not None]
            assert {t.device.type for split in splits for t in split} == {where}
            assert (moved.mean.device.type, moved.std.device.type) == ("cuda", "cuda")
            for index in (torch.tensor([3, 1]), slice(0, 2)):
                x, y = moved.batch(moved.train, index, device)
                assert (x.device.type, y.device.type) == ("cuda", "cuda")
                assert x.shape == (2, 1, 8, 8)
        assert (moved.classes, moved.held_out is None) == (data.classes, data.held_out is None)


def test_on_a_cpu_images_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a GPU is asked")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    data = load(DataConfig())
    assert data.to(torch.device("cpu")) is data
