"""A run's configuration in its run folder: write it there, compare with it, take from it what a resumed run
keeps.

The store knows no configuration and no `ConfigError`: it keeps mappings and raises `StoreError`. This module
translates between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from feedbackhook.experiments.config import ConfigError, RunConfig, SweepConfig, one_line
from feedbackhook.experiments.provenance import provenance
from feedbackhook.store import yaml_text
from feedbackhook.store.errors import StoreError
from feedbackhook.store.run_folder import RunFolder

# What may differ when a run is resumed.
_FREE_ON_RESUME = (
    *("output", "provenance", "data.root", "data.download", "data.cache"),
    *("record.figures", "record.tracking"),
)


@contextmanager
def store_errors() -> Iterator[None]:
    """Raise a `StoreError` of the block as a `ConfigError` that says what to do next."""
    try:
        yield
    except StoreError as error:
        raise ConfigError(f"{error}: choose another output") from error


def as_mapping(config: RunConfig | SweepConfig) -> dict[str, Any]:
    """Return the configuration as it is read back from YAML.

    Raises:
        ConfigError: it holds what YAML cannot, such as a tensor.
    """
    try:
        content: dict[str, Any] = yaml_text.load(yaml_text.dump(asdict(config)))
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration cannot be written to config.yaml: {one_line(error)}") from error
    return content


def write_config(folder: RunFolder, config: RunConfig, processes: int = 1) -> None:
    """Write config.yaml, with versions, machine and command of this process."""
    folder.write_config({**asdict(config), "provenance": provenance(processes)})


def with_stored_machine(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Return `config` with the threads and the device of the run in the folder, where it leaves them open.

    Raises:
        ConfigError: config.yaml is damaged.
    """
    protocol = config.protocol
    with store_errors():
        if not folder.trained() or (protocol.threads is not None and protocol.device != "auto"):
            return config
        stored = folder.stored_config().get("protocol")
        if not isinstance(stored, dict) or not {"threads", "device"} <= stored.keys():
            raise StoreError(f"{folder.path}/config.yaml is damaged: it has no protocol.threads or no device")
    threads = stored["threads"] if protocol.threads is None else protocol.threads
    device = stored["device"] if protocol.device == "auto" else protocol.device
    return replace(config, protocol=replace(protocol, threads=threads, device=device))


def check_same(folder: RunFolder, config: RunConfig, source: Path | None = None) -> None:
    """Refuse to resume a run under another configuration.

    Args:
        folder: the folder of the run.
        config: the configuration asked for, resolved.
        source: the file that holds the run's own configuration; None: the run's config.yaml.

    Raises:
        ConfigError: a key differs, and the message names the first one; or config.yaml is damaged.
    """
    with store_errors():
        stored = _flat(folder.stored_config())
    given = _flat(as_mapping(config))
    for key, default in _defaults().items():
        if not any(name == key or name.startswith(f"{key}.") for name in stored):
            stored[key] = default  # an option that is newer than the run
    for key in [*stored, *given]:
        if not key.startswith(_FREE_ON_RESUME) and stored.get(key) != given.get(key):
            raise ConfigError(
                f"cannot resume the run in {folder.path}: `{key}` was {stored.get(key)!r} in this run and is "
                f"{given.get(key)!r} now; start from {source or folder.path / 'config.yaml'}, or choose "
                "another output"
            )


@cache
def _defaults() -> dict[str, Any]:
    return _flat(as_mapping(RunConfig()))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
