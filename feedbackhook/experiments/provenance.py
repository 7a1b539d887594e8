"""Where a result comes from: versions, machine and command of this process."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("feedbackhook", "torchvision", "timm", "numpy", "scikit-learn")


def provenance(processes: int = 1) -> dict[str, Any]:
    """Return versions, machine and command of this process, and the number of processes if it is not one."""
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
