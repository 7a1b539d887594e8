"""The files of one run, each written so that a kill leaves the old content or the new."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import save_model
from torch import nn

from feedbackhook.store import yaml_text
from feedbackhook.store.atomic import atomic_write, is_temporary
from feedbackhook.store.errors import StoreError
from feedbackhook.store.renamed import refuse_renamed_keys

Status = Literal["running", "paused", "finished", "diverged", "pruned", "interrupted", "failed"]


@dataclass
class RunResult:
    """How a run ended or where it stands; the content of its status.json.

    Args:
        folder: the run folder.
        status: `running`; `paused`, until its sweep has compared the learning rates; `finished`; `diverged`
            (a loss was not finite); `pruned`, since other learning rates were better; `interrupted`; or
            `failed`.
        reason: why it ended early.
        epoch: number of epochs saved.
        step: number of optimizer steps saved.
        last_error: test error in percent at the last evaluation with a finite loss.
        best_error: the smallest test error after an epoch of training; before the first epoch, that of the
            untrained network.
        best_epoch: the epoch of `best_error`.
    """

    folder: Path
    status: Status = "running"
    reason: str | None = None
    epoch: int = 0
    step: int = 0
    last_error: float | None = None
    best_error: float | None = None
    best_epoch: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do: the run has finished, diverged or been pruned."""
        return self.counts or self.status == "pruned"

    @property
    def counts(self) -> bool:
        """Whether its errors belong in means: the run has finished or diverged."""
        return self.status in ("finished", "diverged")

    @property
    def figures(self) -> list[Path]:
        return sorted((self.folder / "figures").glob("*.png"))


class RunFolder:
    """The files of one run under `path`; nothing is created before the first write.

    Args:
        path: the folder.
        writes: whether this process writes. If not, every write does nothing, as in all processes of a
            distributed run but the main one.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes
        self._config = self.path / "config.yaml"
        self._status = self.path / "status.json"
        self._checkpoint = self.path / "checkpoint.pt"

    def result(self) -> RunResult | None:
        """Return the content of status.json; None if there is no run yet, or one that was killed before it
        had written its configuration.

        Raises:
            StoreError: status.json is damaged, or the folder holds something else than a run.
        """
        if not self._status.exists():
            entries = self.path.iterdir() if self.path.is_dir() else ()
            if any(
                entry.name not in ("metrics", "tensorboard", "wandb") and not is_temporary(entry)
                for entry in entries
            ):
                raise StoreError(f"{self.path} is not a run folder and is not empty")
            return None
        try:
            result = RunResult(self.path, **json.loads(self._status.read_text()))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{self._status} is damaged ({error})") from error
        if result.status not in get_args(Status):
            raise StoreError(f"{self._status} is damaged: its status {result.status!r} is unknown")
        begun = self._config.exists() or self._checkpoint.exists()
        return result if begun or result.status != "running" else None

    def touched(self) -> int:
        """Return when a process last wrote here, in nanoseconds of the file system's clock."""
        times = [0]
        for path in (self._status, self._checkpoint, self.path / "metrics", self.path / "metrics" / ".lock"):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime_ns)
        return max(times)

    def trained(self) -> bool:
        """Return whether there is a run to resume, or one that has ended.

        Raises:
            StoreError: see :meth:`result`.
        """
        result = self.result()
        return self._checkpoint.exists() or (result is not None and result.ended)

    def tidy(self) -> None:
        """Remove temporary files of a killed process and the traceback of an earlier failure.

        Only the run that holds the folder's lock may call this.
        """
        for entry in self.path.iterdir() if self._writes else ():
            if is_temporary(entry) or entry.name == "traceback.txt":
                entry.unlink()

    def write_traceback(self, text: str) -> None:
        (self.path / "traceback.txt").write_text(text)

    def write_result(self, result: RunResult) -> None:
        if not self._writes:
            return
        content = {name: value for name, value in vars(result).items() if name != "folder"}
        with atomic_write(self._status) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    def stored_config(self) -> dict[str, Any]:
        """Return the content of config.yaml; do not change it, since runs share equal sections.

        Raises:
            StoreError: config.yaml is missing or damaged, or was written by an earlier version.
        """
        try:
            stored = yaml_text.load_shared(self._config.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise StoreError(f"{self._config} is damaged ({' '.join(str(error).split())})") from error
        if not isinstance(stored, dict):
            raise StoreError(f"{self._config} is damaged: it holds no settings")
        refuse_renamed_keys(self._config, stored)
        return stored

    def write_config(self, content: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        with atomic_write(self._config) as temporary:
            temporary.write_text(yaml_text.dump(content))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the checkpoint, on the CPU; None if there is none yet.

        Raises:
            StoreError: it is damaged.
        """
        if not self._checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise StoreError(f"{self._checkpoint} is damaged ({' '.join(str(error).split())})") from error
        return state

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        if not self._writes:
            return
        with atomic_write(self._checkpoint) as temporary:
            torch.save(state, temporary)

    def remove_checkpoint(self) -> None:
        if self._writes:
            self._checkpoint.unlink(missing_ok=True)

    def write_weights(self, state: dict[str, Any], name: Literal["best", "last"]) -> None:
        """Write a model's state dict as NAME.safetensors; tensors that share memory are written once."""
        if not self._writes:
            return
        with atomic_write(self.path / f"{name}.safetensors") as temporary:
            save_model(_Stateful(state), str(temporary))


class _Stateful(nn.Module):
    """A module with a given state dict, since `save_model` takes a module."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self._state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self._state)
