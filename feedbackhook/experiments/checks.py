"""Errors of a configuration, and checks of single values."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints


class ConfigError(ValueError):
    """The configuration cannot be run as it is; the message says what to change."""


class FolderInUse(ConfigError):
    """Another process is writing to the run folder."""


def check_at_least(key: str, value: int | None, least: int) -> None:
    """Raise a `ConfigError` if `value` is given and is less than `least`."""
    if value is not None and value < least:
        raise ConfigError(f"{key} must be {least} or more, not {value}")


def check_choice(section: Any, prefix: str, name: str) -> None:
    """Raise a `ConfigError` if the field `name` of `section` is not one of the values that its type lists."""
    value, choices = getattr(section, name), get_args(get_type_hints(type(section))[name])
    if value not in choices:
        raise ConfigError(f"{prefix}.{name} must be {' or '.join(choices)}, not {value!r}")
