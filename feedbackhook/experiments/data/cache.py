"""Caches decoded images on disk: one file for each dataset and size, valid until its sources change."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.registry import DATASETS, LIBRARIES
from feedbackhook.store.atomic import atomic_write

logger = logging.getLogger(__name__)

_READER_VERSION = 1  # increase it when the readers make other images from the same files


def cached(
    config: DataConfig, sources: Sequence[Path], read: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what ``read`` returns, from the cache if it is there.

    Cached tensors are mapped into memory, so the processes on one machine share them. A cached file is valid
    if the name, size and numbers of images, the versions of the readers, and the path, size and modification
    time of every file in ``sources`` are the same as when it was written, and its checksum matches. Otherwise
    it is written again, under a temporary name that is then changed, so processes may do this at the same
    time. If the cache cannot be written, a warning is logged.

    Args:
        config: name, size and numbers of images, and the folder of the cache.
        sources: files and folders that ``read`` reads; if one of them is missing, or there are none, nothing
            is cached.
        read: returns the tensors.
    """
    folder = _folder(config)
    if folder is None or not sources:
        return read()
    path, key = folder / _file_name(config, sources), _key(config, sources)
    tensors = read_cached(path, key) if key is not None else None
    if tensors is None:
        tensors = read()
        # the key from before reading, so that a file that changes meanwhile is read again; before a download
        # there is none
        key = key or _key(config, sources)
        if key is not None:
            write_cached(path, key, tensors)
    return tensors


def _folder(config: DataConfig) -> Path | None:
    if config.cache == "none":
        return None
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedbackhook"


def _file_name(config: DataConfig, sources: Sequence[Path]) -> str:
    """One name for each dataset, location, size and number of images, so new content replaces old."""
    kind = re.sub(r"\W+", "-", config.name.partition(":")[0])
    size = "own" if config.size is None else f"{config.size}x{config.size}"
    place = hashlib.sha256("\n".join(os.path.abspath(p) for p in sources).encode(errors="surrogateescape"))
    few = "" if _counts(config) == (None, None) else "-{}+{}".format(*_counts(config))
    return f"{kind}-{size}{few}-{place.hexdigest()[:16]}.safetensors"


def _counts(config: DataConfig) -> tuple[int | None, int | None]:
    return config.train_images, config.test_images


def _key(config: DataConfig, sources: Sequence[Path]) -> str | None:
    """A hash of everything that the decoded images depend on, or None if a source is missing."""
    known = DATASETS.get(config.name)
    libraries = [_version(name) for name in (LIBRARIES if known is None else known.libraries)]
    rows = [f"{config.name} {config.size} {_counts(config)} {_READER_VERSION} {libraries}"]
    try:
        for source in sources:
            for file in _files(source):
                status = file.stat()
                path = file.relative_to(source.parent)
                rows.append(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")
    except OSError:
        return None
    return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _files(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    for folder, folders, names in os.walk(source, followlinks=True):  # as torchvision does
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def read_cached(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return the tensors in a file of the cache; None if it is missing, damaged or has another key."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): decoding the images again", path, error)
        return None
    if about.get("checksum") != _checksum(tensors):
        logger.warning("%s is damaged (its checksum differs): decoding the images again", path)
        return None
    return tensors


def write_cached(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a file of the cache, or log why that is impossible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"key": key, "checksum": _checksum(tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=about)
    except (OSError, SafetensorError) as error:
        logger.warning("cannot cache the decoded images: %s; set data.cache to another folder", error)


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().data, value)
    return f"{value:08x}"
