"""Errors of the parts that a run is built from, as errors of its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from feedbackhook.experiments.config import ConfigError


@contextmanager
def config_errors() -> Iterator[None]:
    """Raise as a `ConfigError` whatever the block cannot build as configured."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
