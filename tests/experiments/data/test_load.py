"""Data from scikit-learn, torchvision and folders of images, without a download."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import bounds
from support.bounds import ROUNDING
from support.datasets import images, write_mnist
from torch import Tensor

from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data.load import ImageData, load, minibatches, seeded

CPU = torch.device("cpu")


def test_digits_have_a_fixed_stratified_split() -> None:
    data = load(DataConfig())
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.classes == 10
    for split, share in ((data.train, 143.7), (data.test, 36.0)):
        assert (split.labels.bincount() - share).abs().max() < 5
        assert split.images.dtype == torch.uint8
    seen = {row.tobytes() for row in data.train.images.numpy()}
    assert sum(row.tobytes() in seen for row in data.test.images.numpy()) == 0
    again = load(DataConfig())
    assert torch.equal(again.test.images, data.test.images)
    assert torch.equal(again.train.labels, data.train.labels)


def test_a_share_of_the_training_set_is_held_out_class_by_class() -> None:
    whole, data = load(DataConfig()), load(DataConfig(val_fraction=0.1))
    assert whole.val is None
    assert data.val is not None
    assert (len(data.train.labels), len(data.val.labels)) == (1293, 144)
    assert (data.val.labels.bincount() - whole.train.labels.bincount() * 0.1).abs().max() <= 1
    rows = sorted(row.tobytes() for split in (data.train, data.val) for row in split.images.numpy())
    assert rows == sorted(row.tobytes() for row in whole.train.images.numpy())
    assert torch.equal(data.test.images, whole.test.images)
    again = load(DataConfig(val_fraction=0.1)).val
    assert again is not None
    assert torch.equal(again.images, data.val.images)
    x, _ = data.batch(data.train, slice(None), CPU)
    assert abs(x.double().mean()) <= rounding_of(x)  # of what is trained on


def rounding_of(x: Tensor) -> float:
    """What five roundings in float32 come to: of the pixel, the mean, their difference, the deviation
    and the quotient."""
    return 5 * ROUNDING["float32"] * float(x.abs().max())


def test_digits_are_resized_and_keep_their_range() -> None:
    small, large = load(DataConfig()), load(DataConfig(size=28))
    assert large.train.images.shape == (1437, 1, 28, 28)
    assert torch.equal(large.train.labels, small.train.labels)
    assert small.train.images.max() == 255
    places = (np.arange(28) + 0.5) * 8 / 28 - 0.5  # the middles of large pixels, in small ones
    weights = np.stack([np.interp(places, np.arange(8), row) for row in np.eye(8)])
    expected = np.einsum("nij,ik,jl->nkl", small.train.images[:, 0].double().numpy(), weights, weights)
    # Rows and then columns are rounded to whole numbers, each by a half at most. The weights of two pixels
    # are in fixed point, to 2^-14.
    bound = 2 * (1 / 2 + 2 * 255 * 2.0**-14)
    assert np.abs(large.train.images[:, 0].double().numpy() - expected).max() <= bound


def test_batches_are_normalised_by_the_training_set() -> None:
    data = load(DataConfig())
    x, _ = data.batch(data.train, slice(None), CPU)
    assert x.dtype == torch.float32
    assert abs(x.double().mean()) <= rounding_of(x)
    assert abs(x.double().std(correction=0) - 1) <= rounding_of(x)
    index = torch.tensor([3, 1])
    part, labels = data.batch(data.test, index, CPU)
    expected = (data.test.images[index].float() / 255 - data.mean) / data.std
    torch.testing.assert_close(part, expected)
    assert torch.equal(labels, data.test.labels[index])


def test_minibatches_are_a_shuffled_epoch_of_whole_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (list(minibatches(23, 5, generator)) for _ in range(2))
    for epoch in (first, second):
        assert [len(index) for index in epoch] == [5, 5, 5, 5]
        assert len(set(torch.cat(epoch).tolist())) == 20
    assert not torch.equal(torch.cat(first), torch.cat(second))
    again = list(minibatches(23, 5, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.cat(first), torch.cat(again))


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_dataset_with_a_train_flag_is_read_by_its_name(tmp_path: Path, name: str) -> None:
    content = write_mnist(tmp_path, name)
    data = load(DataConfig(name, root=str(tmp_path)))
    assert np.array_equal(data.train.images[:, 0].numpy(), content["train"])
    assert np.array_equal(data.test.images[:, 0].numpy(), content["t10k"])
    assert data.test.labels.tolist() == list(range(10))


def test_a_dataset_with_named_splits_is_read_by_its_name(tmp_path: Path) -> None:
    for split, folder in (("train", "train"), ("test", "test")):
        for k, label in enumerate(["negative", "positive"]):
            path = tmp_path / "rendered-sst2" / folder / label / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((6, 6, 3), 10 * k + (split == "test"), np.uint8)).save(path)
    (tmp_path / "rendered-sst2" / "valid").mkdir()
    data = load(DataConfig("RenderedSST2", root=str(tmp_path)))
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10]
    assert data.test.images[:, 0, 0, 0].tolist() == [1, 11]
    assert data.classes == 2


def test_a_dataset_without_splits_gets_a_stratified_one() -> None:
    data = load(DataConfig("FakeData", size=4))
    assert data.train.images.shape == (800, 3, 4, 4)
    assert data.test.images.shape == (200, 3, 4, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for k, name in enumerate(["cat", "dog", "eel"]):
            path = tmp_path / split / name
            path.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(images(9, 9, 3, seed=10 * k + i)).save(path / f"{i}.png")
    return tmp_path


def loaded(path: Path, size: int | None = None) -> ImageData:
    return load(DataConfig(f"imagefolder:{path}", size=size))


def test_a_folder_of_images_is_read(folder: Path) -> None:
    data = loaded(folder)
    assert data.train.images.shape == (6, 3, 9, 9)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(data.train.images[3].permute(1, 2, 0).numpy(), images(9, 9, 3, seed=11))
    (folder / "test").rename(folder / "val")
    assert torch.equal(loaded(folder).test.images, data.test.images)


def test_images_of_several_sizes_need_a_size(folder: Path) -> None:
    Image.fromarray(images(5, 7, 3)).save(folder / "train" / "cat" / "9.png")
    with pytest.raises(ConfigError, match=r"from 5x7 to 9x9 pixels\): set data.size"):
        loaded(folder)
    assert loaded(folder, size=4).train.images.shape == (7, 3, 4, 4)


def test_a_test_set_of_another_size_needs_a_size(folder: Path) -> None:
    for path in (folder / "test").rglob("*.png"):
        Image.fromarray(images(5, 5, 3)).save(path)
    with pytest.raises(ConfigError, match=r"differ in size: set data\.size"):
        loaded(folder)


def test_classes_that_differ_are_an_error(folder: Path) -> None:
    (folder / "test" / "dog").rename(folder / "test" / "ant")
    with pytest.raises(ConfigError, match=r"test/dog is missing, but .*train/dog exists \(and 1 more; "):
        loaded(folder)


def test_a_channel_of_one_value_does_not_divide_by_zero(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    data = loaded(folder)
    x, _ = data.batch(data.test, slice(None), CPU)
    assert x.eq(0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig("MNIST", root="nowhere"), r"MNIST could not be read.*nowhere.*--data.download true"),
        (DataConfig("ImageNet", root="nowhere"), r"ImageNet.*nowhere.*cannot download it: set --data.root"),
        (DataConfig("CocoDetection"), "'CocoDetection' has no classes for training and test.*CIFAR10"),
        (DataConfig("VOCSegmentation"), "'VOCSegmentation' has no classes for training and test"),
        (DataConfig("CIFAR11"), "'CIFAR11' is unknown; did you mean 'CIFAR10'"),
        (DataConfig("imagefolder:nowhere"), r"nowhere/train is missing.*; imagefolder:PATH needs PATH/train"),
        (DataConfig(val_fraction=1.0), "data.val_fraction must be a fraction from 0 to less than 1, not 1.0"),
        (DataConfig(val_fraction=0.001), "cannot split off 0.001 of the 1437 images"),
        (DataConfig(size=0), "data.size must be a positive number of pixels, not 0"),
    ],
    ids=lambda value: value.name if isinstance(value, DataConfig) else "",
)
def test_what_cannot_be_loaded_is_one_clear_error(
    config: DataConfig, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(config)


def test_an_empty_class_folder_is_one_clear_error(folder: Path) -> None:
    (folder / "train" / "ant").mkdir()
    with pytest.raises(ConfigError, match="train/ant contains no images"):
        loaded(folder)


def test_a_damaged_download_is_one_clear_error(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"MNIST could not be read: .*train-images-idx3-ubyte is damaged"):
        load(DataConfig("MNIST", root=str(tmp_path)))


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda _: b"no image"], ids=["cut", "foreign"])
def test_a_damaged_image_is_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "test" / "dog" / "1.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"test/dog/1\.png cannot be decoded"):
        loaded(folder)


def test_a_part_of_the_images_is_a_fixed_draw_of_each_class_by_its_share() -> None:
    whole, part = load(DataConfig()), load(DataConfig(train_images=200, test_images=100))
    for split, of, count in ((part.train, whole.train, 200), (part.test, whole.test, 100)):
        assert len(split.labels) == count
        share = of.labels.bincount() * count / len(of.labels)
        assert (split.labels.bincount() - share).abs().max() < 1
        places = {row.tobytes(): i for i, row in enumerate(of.images.numpy())}
        found = [places[row.tobytes()] for row in split.images.numpy()]
        assert torch.equal(split.labels, of.labels[found])
        assert found == sorted(found)
    again = load(DataConfig(train_images=200, test_images=100))
    assert torch.equal(again.train.images, part.train.images)
    for config, message in (
        (DataConfig(train_images=1438), "data.train_images is 1438, but digits has 1437"),
        (DataConfig(test_images=4), "data.test_images 4 of 360"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(config)


def test_of_a_folder_only_the_wanted_images_are_decoded(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(images(5, 5, 3, seed=i)).save(tmp_path / split / label / f"{i}.png")
    name = f"imagefolder:{tmp_path}"
    few = load(DataConfig(name, train_images=2, test_images=4))
    assert (few.train.labels.tolist(), few.test.labels.tolist()) == ([0, 1], [0, 0, 1, 1])
    assert load(DataConfig(name)).train.labels.tolist() == [0] * 4 + [1] * 4  # no cached part
    wanted = {image.tobytes() for image in few.train.images.numpy()}
    for path in (tmp_path / "train").rglob("*.png"):
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
        if pixels.tobytes() not in wanted:
            path.write_bytes(b"damaged")
    assert torch.equal(load(DataConfig(name, train_images=2, test_images=4)).train.images, few.train.images)
    with pytest.raises(ConfigError, match="cannot be decoded"):
        load(DataConfig(name))


def test_augmentation_is_timms_and_follows_the_seed() -> None:
    data = load(DataConfig(size=16))
    crop = data.augmentation({"scale": [0.5, 0.5], "ratio": [1, 1], "hflip": 0.0, "color_jitter": 0.0})
    with seeded(3, 1):
        first = crop(data.train.images[:4])
    with seeded(3, 1):
        torch.manual_seed(9)
        again = crop(data.train.images[:4])
    with seeded(3, 2):
        other = crop(data.train.images[:4])
    assert first.shape == (4, 1, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    none = data.augmentation({"no_aug": True})
    expected, _ = data.batch(data.train, slice(4), CPU)
    torch.testing.assert_close(
        none(data.train.images[:4]), expected, atol=16 * bounds.ROUNDING["float32"], rtol=0
    )


def test_seeded_leaves_the_generators_as_they_were() -> None:
    import random

    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    with seeded(5):
        drawn = random.random(), np.random.random()
    assert (random.random(), np.random.random()) == expected
    with seeded(5):
        assert (random.random(), np.random.random()) == drawn
    assert drawn != expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sclae": [0.5, 1]}, "sclae"),
        ({"use_prefetcher": True}, "does not return one normalized image"),
        ({"is_training": False}, "is_training"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(DataConfig(size=16)).augmentation(options)
