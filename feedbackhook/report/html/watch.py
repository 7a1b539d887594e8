"""Renew the page of a sweep that is under way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from feedbackhook.report.html.page import Renewal, write
from feedbackhook.store import manifest
from feedbackhook.store.errors import StoreError
from feedbackhook.store.run_folder import RunFolder

__all__ = ["Standing", "watch"]


@dataclass(frozen=True)
class Standing:
    """How far a sweep is: the number of planned runs, of those that have ended, and of those that failed."""

    planned: int
    ended: int
    failed: int

    @property
    def over(self) -> bool:
        return self.ended + self.failed == self.planned


def watch(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    minutes: float,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Write the page about the sweep in ``folder`` to ``path`` every ``minutes``, until all runs have ended.

    Until then, the page has browsers load it again as often. An interrupt ends the watch with a last page,
    which does not, and is raised again.

    Args:
        folder: the sweep's folder.
        path: the file.
        minutes: between two pages.
        tell: called with a line about each page.
        sleep: waits for a number of seconds.

    Raises:
        StoreError: the folder holds no sweep, or its manifest is missing or damaged.
        ReportError: the file cannot be written.
    """
    try:
        while not (now := standing(folder)).over:
            written = datetime.now().astimezone()
            write(folder, path, Renewal(minutes, written.strftime("%Y-%m-%d %H:%M %Z")))
            tell(
                f"{written:%H:%M}  {now.ended} of {now.planned} runs have ended"
                f"{f', {now.failed} failed' if now.failed else ''}: {path}"
            )
            sleep(60 * minutes)
    except KeyboardInterrupt:
        write(folder, path)
        raise
    failed = f"; {now.failed} failed" if now.failed else ""
    tell(f"{now.ended} of {now.planned} runs have ended{failed}: the page is final")
    return write(folder, path)


def standing(folder: str | os.PathLike[str]) -> Standing:
    """Return how far the sweep in ``folder`` is. A run whose status cannot be read has not ended."""
    runs = manifest.read(Path(folder)).runs
    statuses = [_status(Path(folder) / run.name) for run in runs]
    ended = sum(status in ("finished", "diverged", "pruned") for status in statuses)
    return Standing(len(runs), ended, statuses.count("failed"))


def _status(folder: Path) -> str | None:
    try:
        result = RunFolder(folder).result()
    except StoreError:
        return None
    return None if result is None else result.status
