"""A run folder: the files of one run, each written so that a kill leaves the old content or the new."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import save_model
from torch import nn

from feedbackhook.experiments.config import ConfigError, RunConfig, one_line
from feedbackhook.store.recorder import written_aside

Status = Literal["running", "finished", "diverged", "interrupted", "failed"]

# what a run may be given anew when it is resumed
_FREE_ON_RESUME = ("output", "provenance", "data.root", "data.download", "data.cache", "record.figures")
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's are ten times as fast, where it is built in
_YAML_OUT = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_PACKAGES = ("feedbackhook", "torchvision", "timm", "numpy", "scikit-learn")


@dataclass
class RunResult:
    """What became of a run; the content of its status.json.

    Args:
        folder: the run folder.
        status: running, finished, diverged (a loss was not finite), interrupted or failed.
        reason: why it ended early, in words.
        epoch: epochs done.
        step: updates of the weights.
        last_error: test error in percent at the last evaluation with a finite loss.
        best_error: the smallest after an epoch of training, and `best_epoch` that epoch; the untrained
            network's (epoch 0) where there is no other.
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
        """Whether there is nothing left to do: it is finished, or has diverged."""
        return self.status in ("finished", "diverged")

    @property
    def figures(self) -> list[Path]:
        return sorted((self.folder / "figures").glob("*.png"))


class RunFolder:
    """The files of one run under ``path``; nothing is made before the first write.

    Args:
        path: the folder.
        writes: whether this process writes; of several, one does, and in the others every write does nothing.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes
        self._config = self.path / "config.yaml"
        self._status = self.path / "status.json"
        self._checkpoint = self.path / "checkpoint.pt"

    def result(self) -> RunResult | None:
        """What status.json says, or None where there has been no run, or one that was killed before it had
        written its configuration.

        Raises:
            ConfigError: status.json is damaged, or the folder holds other things than a run.
        """
        if not self._status.exists():
            entries = self.path.iterdir() if self.path.is_dir() else ()
            if any(
                entry.name not in ("metrics", "tensorboard") and not _is_aside(entry) for entry in entries
            ):
                raise ConfigError(f"{self.path} is no run folder, and not empty: give another output")
            return None
        try:
            result = RunResult(self.path, **json.loads(self._status.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._status} is damaged ({error}): give another output") from error
        if result.status not in get_args(Status):
            raise ConfigError(f"{self._status} has the unknown status {result.status!r}")
        begun = self._config.exists() or self._checkpoint.exists()
        return result if begun or result.status != "running" else None

    def touched(self) -> int:
        """When the process at work here last showed itself, in nanoseconds of the file system's clock."""
        times = [0]
        for path in (self._status, self._checkpoint, self.path / "metrics", self.path / "metrics" / ".lock"):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime_ns)
        return max(times)

    def trained(self) -> bool:
        """Whether there is anything of a run to go on with, or its end."""
        result = self.result()
        return self._checkpoint.exists() or (result is not None and result.ended)

    def tidy(self) -> None:
        """Remove what a killed process was writing and what an earlier failure left; for the run that has the
        folder to itself."""
        for entry in self.path.iterdir() if self._writes else ():
            if _is_aside(entry) or entry.name == "traceback.txt":
                entry.unlink()

    def write_traceback(self, text: str) -> None:
        (self.path / "traceback.txt").write_text(text)

    def write_result(self, result: RunResult) -> None:
        if not self._writes:
            return
        content = {name: value for name, value in vars(result).items() if name != "folder"}
        with written_aside(self._status) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n")

    def stored_config(self) -> dict[str, Any]:
        """The configuration of the run that is here; not to be changed, since runs share what is alike.

        Raises:
            ConfigError: config.yaml is missing or damaged.
        """
        try:
            stored = _from_yaml(self._config.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot go on: {self._config} is damaged ({one_line(error)})") from error
        if not isinstance(stored, dict):
            raise ConfigError(f"cannot go on: {self._config} is damaged")
        return stored

    def write_config(self, config: RunConfig, processes: int = 1) -> None:
        if not self._writes:
            return
        content = {**asdict(config), "provenance": provenance(processes)}
        with written_aside(self._config) as aside:
            aside.write_text(yaml.dump(content, Dumper=_YAML_OUT, sort_keys=False, allow_unicode=True))

    def check_same(self, config: RunConfig, source: Path | None = None) -> None:
        """Refuse to go on with a run under another configuration than it began with.

        Args:
            config: what is asked for.
            source: the file with which to go on; None: the run's config.yaml.

        Raises:
            ConfigError: naming the first key that differs.
        """
        stored, given = _flat(self.stored_config()), _flat(as_yaml(config))
        for key, default in _defaults().items():
            if not any(name == key or name.startswith(f"{key}.") for name in stored):
                stored[key] = default  # an option that is newer than the run
        for key in [*stored, *given]:
            if not key.startswith(_FREE_ON_RESUME) and stored.get(key) != given.get(key):
                raise ConfigError(
                    f"cannot go on with the run in {self.path}: its {key} is {stored.get(key)!r}, here it is "
                    f"{given.get(key)!r}; start from {source or self._config}, or give another output"
                )

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, on the CPU, or None where there is none yet.

        Raises:
            ConfigError: it is damaged.
        """
        if not self._checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise ConfigError(f"cannot go on: {self._checkpoint} is damaged ({one_line(error)})") from error
        return state

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        if not self._writes:
            return
        with written_aside(self._checkpoint) as aside:
            torch.save(state, aside)

    def remove_checkpoint(self) -> None:
        """Remove the checkpoint of a run that has ended and needs it no more."""
        if self._writes:
            self._checkpoint.unlink(missing_ok=True)

    def write_weights(self, state: dict[str, Any], name: Literal["best", "last"]) -> None:
        """Those of a model's state dict; of tensors that share their memory, one."""
        if not self._writes:
            return
        with written_aside(self.path / f"{name}.safetensors") as aside:
            save_model(_Stated(state), str(aside))


class _Stated(nn.Module):
    """A module of this state, as safetensors asks for it."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self._state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self._state)


def _is_aside(path: Path) -> bool:
    """Whether this is what `written_aside` had not yet renamed."""
    return re.fullmatch(r"\..+\.\d+", path.name) is not None


@cache
def _defaults() -> dict[str, Any]:
    return _flat(as_yaml(RunConfig()))


def as_yaml(config: RunConfig) -> dict[str, Any]:
    """The configuration as it is read back from YAML.

    Raises:
        ConfigError: it holds what YAML cannot, such as a tensor.
    """
    try:
        content: dict[str, Any] = yaml.load(yaml.dump(asdict(config), Dumper=_YAML_OUT), _YAML)
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration cannot be written to config.yaml: {one_line(error)}") from error
    return content


def provenance(processes: int = 1) -> dict[str, Any]:
    """Versions, machine and command of this process, and how many processes the run began on, if several."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its build
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    many = {"processes": processes} if processes > 1 else {}
    return {"versions": versions, "machine": machine, **many, "command": shlex.join(sys.argv)}


def _from_yaml(text: str) -> Any:
    """What YAML text holds. A sweep's configurations have most of their sections in common, and each is read
    once, which for ten thousand of them is minutes less."""
    sections = re.findall(r"^\w+:.*\n(?:[ -].*\n)*", text, re.MULTILINE)
    if "".join(sections) != text or "&" in text:  # not as it is written here, or sections that share objects
        return yaml.load(text, _YAML)
    stored: dict[str, Any] = {}
    try:
        for section in sections:
            stored.update(_section(section))
    except (yaml.YAMLError, TypeError, ValueError):
        return yaml.load(text, _YAML)  # whose error tells the line
    return stored


@cache
def _section(text: str) -> Any:
    return yaml.load(text, _YAML)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
