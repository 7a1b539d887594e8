"""Runs with their figures, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from feedbackhook.experiments.config import (
    RunConfig,
)
from feedbackhook.experiments.training.progress import Progress
from feedbackhook.experiments.training.run import train as train_alone
from feedbackhook.report.plots import draw_run

train = partial(train_alone, draw=draw_run)
"""As the command line trains: with figures."""


def at(epoch: int, batch: int | None, error: type[BaseException]) -> Callable[[Progress], None]:
    """A progress that raises after a step of an epoch, or (None) after its evaluation."""

    def progress(now: Progress) -> None:
        if now.epoch == epoch and (now.test_error is not None if batch is None else now.batch == batch):
            raise error("stop here")

    return progress


def status(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(str(config.output)) / "status.json").read_text())
    return content


def series(table: pandas.DataFrame, metric: str) -> list[float]:
    values: list[float] = table[table.metric == metric]["value"].tolist()
    return values
