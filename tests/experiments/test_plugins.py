"""A package of its own adds rules, datasets and networks by an entry point, also for the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODULE = """
from dataclasses import dataclass

import feedbackhook
from torch import nn
from feedbackhook.experiments.models.registry import register_network


@feedbackhook.register_rule("half")
@dataclass(frozen=True)
class Half:
    def draw(self, weight, rng):
        return {}

    def feedback(self, weight, drawn):
        return weight / 2


@register_network("mine/linear", input_size=(1, 8, 8))
def linear(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))
"""


def install(folder: Path, module: str) -> dict[str, str]:
    """Write an installed package with one module and an entry point; return the environment that finds it."""
    (folder / "my_rules.py").write_text(module)
    info = folder / "my_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[feedbackhook]\nmine = my_rules\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "feedbackhook", *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_the_command_line_knows_the_rules_and_networks_of_an_installed_package(tmp_path: Path) -> None:
    environment = install(tmp_path, MODULE)
    done = command(environment, "inspect", "mine/linear", "--mode", "half")
    assert done.returncode == 0, done.stderr
    assert "half" in done.stdout


def test_a_plugin_that_cannot_be_imported_is_named_with_its_package(tmp_path: Path) -> None:
    done = command(install(tmp_path, "import a_package_that_is_missing"), "data", "list")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for word in ("'mine'", "my-rules", "a_package_that_is_missing", "uninstall"):
        assert word in done.stderr
