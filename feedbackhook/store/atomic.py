"""Write files such that a kill or a power failure leaves the old content or the new, never a part of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path next to `path`, and rename it to `path` once its content is on disk.

    If the block raises, `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_temporary(path: Path) -> bool:
    """Return whether `path` is a temporary file of :func:`atomic_write`, left behind by a kill."""
    return re.fullmatch(r"\..+\.\d+", path.name) is not None
