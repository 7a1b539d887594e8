"""The processes that torchrun has started, and which of them reports an error to the user."""

from __future__ import annotations

import os

import torch

from feedbackhook.experiments.config import ConfigError


class ReportedByMain(ConfigError):
    """An error of the configuration that the main process reports to the user."""


def world_size() -> int:
    """Return how many processes torchrun or the caller's process group has for one run; 1 without them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is the main process of all."""
    return int(os.environ.get("RANK", "0")) == 0


def is_local_main() -> bool:
    """Return whether this is the main process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def shared_error(message: str) -> ConfigError:
    """Return the error that all processes raise alike, and that only the main process reports."""
    return ConfigError(message) if is_main() else ReportedByMain(message)
