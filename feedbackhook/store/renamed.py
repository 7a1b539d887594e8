"""What earlier versions called the keys of a configuration and the metrics of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from feedbackhook.store.errors import StoreError

KEYS = {
    "data.held_out": "data.val_fraction",
    "model.trained": "model.trainable",
    "protocol.rate_factor": "protocol.lr_factor",
    "protocol.rates": "protocol.lr_factors",
    "protocol.accumulation": "protocol.gradient_accumulation_steps",
    "protocol.schedule": "protocol.lr_schedule",
}
METRICS = {"held_out_error": "val_error", "held_out_loss": "val_loss"}


def refuse_renamed_keys(path: Path, config: Mapping[str, Any]) -> None:
    """Raise a `StoreError` if the configuration in the file `path` uses a key that has been renamed."""
    found = [
        old
        for old in KEYS
        for section, _, key in [old.partition(".")]
        if isinstance(config.get(section), Mapping) and key in config[section]
    ]
    _refuse(path, found, KEYS)


def refuse_renamed_metrics(path: Path, metrics: Iterable[str]) -> None:
    """Raise a `StoreError` if the table in the folder `path` holds a metric that has been renamed."""
    present = set(metrics)
    _refuse(path, [old for old in METRICS if old in present], METRICS)


def _refuse(path: Path, found: list[str], names: Mapping[str, str]) -> None:
    if found:
        changes = ", ".join(f"{old} is now {names[old]}" for old in found)
        raise StoreError(f"{path} was written by an earlier version of feedbackhook: {changes}")
