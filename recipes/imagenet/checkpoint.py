"""Checkpoints: written atomically, and refused if the settings changed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from feedbackhook.store.atomic import atomic_write


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write to a temporary file, then rename it: an interrupt leaves the old checkpoint or the new one."""
    with atomic_write(path) as temporary:
        torch.save(dict(state), temporary)


def load(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint to resume from, or None if there is none.

    Raises:
        ValueError: The checkpoint is damaged, or from a run with other settings.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(
            f"{path} is damaged ({reason}): choose another --output, or remove the file"
        ) from error
    if changed := [name for name in settings if settings[name] != saved.get(name)]:
        shown = ", ".join(
            f"{name} {_short(saved.get(name))}, not {_short(settings[name])}" for name in changed
        )
        raise ValueError(f"{path} is from a run with {shown}: choose another --output")
    return state


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
