"""Small datasets on disk in their published layouts, and what tests of readers share."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from feedbackhook.cli import main
from feedbackhook.experiments.config import ConfigError, DataConfig
from feedbackhook.experiments.data import readers
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.data.split import Split

SIZE = 8


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, np.ndarray]:
    """MNIST's files, as torchvision leaves them, with 20 training and 10 test images."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    content = {"train": images(20, 28, 28, seed=1), "t10k": images(10, 28, 28, seed=2)}
    for prefix, pixels in content.items():
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        header = struct.pack(">iiii", 0x803, *pixels.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">ii", 0x801, len(labels))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return content


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
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], **changes))


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


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(["data", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return status, printed.out.splitlines()


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a source is read")

    monkeypatch.setattr(readers, "find", fail)
