"""The cache of decoded images."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.datasets
from PIL import Image
from support.bounds import HANG
from support.datasets import (
    SIZE,
    config,
    error,
    no_decoding,
    same,
    write_classes,
    write_image,
)
from support.trees import (
    TREES,
    mnist,
)

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data import cache
from feedbackhook.experiments.data.load import load


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
    assert "cannot cache the decoded images: no space left" in caplog.text
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
    assert "cannot cache the decoded images" in caplog.text


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
    write = cache.write_cached
    cache.write_cached = lambda *a: (barrier.wait(HANG), write(*a))  # both have decoded, none has written
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
