"""Shared by the recipes with their own training loop: rules, kept results, processes and colors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import joblib
import torch
from rich.console import Console
from rich.progress import track

from feedbackhook.report import theme
from feedbackhook.store.atomic import atomic_write

Settings = dict[str, Any]
Result = dict[str, Any]

RULES: dict[str, dict[str, Any] | None] = {
    "backprop": None,
    "sign 1": {"mode": "sign", "concordance": 1.0},
    "sign 0.75": {"mode": "sign", "concordance": 0.75},
    "sign 0.5": {"mode": "sign", "concordance": 0.5},
    "random": {"mode": "random"},
}
"""Keyword arguments of `feedbackhook.patch` by the rule's name in the tables; None: no patch."""


def check_names(option: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError if a given name is not known."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown {option} {unknown}; known: {', '.join(known)}")


def run_once(file: Path, settings: Settings, work: Callable[[], Result]) -> Result:
    """Return the result in `file`, or call `work` on one thread and write what it returns to `file`.

    Raises:
        ValueError: The result in `file` was made with other settings.
    """
    if file.exists():
        result: Result = json.loads(file.read_text())
        if result["settings"] != settings:
            changed = [name for name in settings if result["settings"].get(name) != settings[name]]
            raise ValueError(
                f"{file} was made with other settings ({', '.join(changed)}): remove it, "
                "or choose another --output"
            )
        return result
    torch.set_num_threads(1)
    began = time.perf_counter()
    result = {"settings": settings, **work(), "seconds": round(time.perf_counter() - began, 2)}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


def run_in_processes(
    train: Callable[..., Result], calls: Sequence[tuple[Any, ...]], jobs: int, words: str, console: Console
) -> list[Result]:
    """Call `train` with each tuple of arguments, `jobs` at a time; return the results in the same order."""
    finished = joblib.Parallel(n_jobs=min(jobs, max(1, len(calls))), return_as="generator")(
        joblib.delayed(train)(*arguments) for arguments in calls
    )
    return list(track(finished, description=words, total=len(calls), console=console))


def rule_colors() -> dict[str, object]:
    """Return a color for each of `RULES`: sign feedback has a scale, by its concordance."""
    signs = [rule for rule in RULES if rule.startswith("sign")]
    return {
        "backprop": theme.look("backprop").color,
        **dict(zip(signs, theme.sequence(len(signs)), strict=True)),
        "random": theme.look("random").color,
    }


LAST_LAYER_COLOR = "#222222"
"""For the network of which only the last layer learns."""
