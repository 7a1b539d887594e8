"""Decoded images on disk: one file for each dataset and size, good while its sources are as they were."""

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
from feedbackhook.store.atomic import atomic_write

logger = logging.getLogger(__name__)

_LIBRARIES = {
    "TIMIT-80": ("librosa", "soundfile")
}  # by which it is read; all others by torchvision and pillow
_READER_VERSION = 1  # to be raised when the readers make other images of the same files


def cached(
    config: DataConfig, sources: Sequence[Path], read: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What ``read`` gives, from the cache where that holds it.

    The tensors of a hit are mapped into memory, so that the processes of one machine share them. A file is
    taken when name, size, numbers of images, versions of the readers, and path, size and time of change of
    every file among ``sources`` are those under which it was written, and its checksum holds; else it is
    written anew, atomically, so that processes that do so at once end with the same. A cache that
    cannot be written is a warning.

    Args:
        config: name, size and numbers of images, and the folder of the cache.
        sources: files and folders that ``read`` reads; where one is missing, or there are none, nothing is
            cached.
        read: gives the tensors.
    """
    folder = _folder(config)
    if folder is None or not sources:
        return read()
    path, key = folder / _file_name(config, sources), _key(config, sources)
    tensors = _stored(path, key) if key is not None else None
    if tensors is None:
        tensors = read()
        # a file that changes while it is read goes by what it was, and so is read again; after a download
        # there was nothing before
        key = key or _key(config, sources)
        if key is not None:
            _store(path, key, tensors)
    return tensors


def _folder(config: DataConfig) -> Path | None:
    if config.cache == "none":
        return None
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedbackhook"


def _file_name(config: DataConfig, sources: Sequence[Path]) -> str:
    """One for each dataset, place, size and number of images: what is written anew takes the place of what is
    out of date."""
    kind = re.sub(r"\W+", "-", config.name.partition(":")[0])
    size = "own" if config.size is None else f"{config.size}x{config.size}"
    place = hashlib.sha256("\n".join(os.path.abspath(p) for p in sources).encode(errors="surrogateescape"))
    few = "" if _counts(config) == (None, None) else "-{}+{}".format(*_counts(config))
    return f"{kind}-{size}{few}-{place.hexdigest()[:16]}.safetensors"


def _counts(config: DataConfig) -> tuple[int | None, int | None]:
    return config.train_images, config.test_images


def _key(config: DataConfig, sources: Sequence[Path]) -> str | None:
    """A hash of all that the decoded images follow from, or None where a source is missing."""
    libraries = [_version(name) for name in _LIBRARIES.get(config.name, ("torchvision", "pillow"))]
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


def _stored(path: Path, key: str) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): its images are read and decoded again", path, error)
        return None
    if about.get("checksum") != _checksum(tensors):
        logger.warning("%s is damaged (its checksum differs): its images are read and decoded again", path)
        return None
    return tensors


def _store(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"key": key, "checksum": _checksum(tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=about)
    except (OSError, SafetensorError) as error:
        logger.warning("decoded images are not kept for the next run: %s (data.cache)", error)


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().data, value)
    return f"{value:08x}"
