"""What is published: the wheel has all that the package needs, and trains without the sources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

import feedbackhook


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that no build folder is left behind."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def tracked() -> list[str]:
    """The files that a wheel is built from, which may not have been committed yet."""
    names = ["pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    package = [path.relative_to(ROOT) for path in (ROOT / "feedbackhook").rglob("*")]
    return [
        *names,
        *(str(name) for name in package if "__pycache__" not in name.parts and (ROOT / name).is_file()),
    ]


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked() if name.startswith("feedbackhook/")}
    assert {"feedbackhook/py.typed", "feedbackhook/report/html/page.html.jinja"} < held


def test_without_git_the_version_is_the_next_one(wheel: Path) -> None:
    """As in an archive of the sources. The license is named by its SPDX expression."""
    assert re.fullmatch(r"feedbackhook-\d+\.\d+\.\d+\.dev0-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = file.read(name).decode()
    assert "License-Expression: MIT" in metadata
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, flags=re.MULTILINE)
    assert sorted(needed) == ["numpy", "torch"]


def test_the_wheel_alone_trains_and_reports(wheel: Path, tmp_path: Path) -> None:
    """In a process that finds the package in the wheel's files only."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    command = (
        "import sys, feedbackhook; from feedbackhook.cli import main; "
        f"assert feedbackhook.__file__.startswith({str(installed)!r}); "
        "assert feedbackhook.__version__.endswith('.dev0'), feedbackhook.__version__; "
        "small = ['--model.name', 'timm/test_resnet', '--data.size', '16', '--data.cache', 'none']; "
        "assert main(['train', *small, '--protocol.epochs', '1', '--output', 'runs/a']) == 0; "
        "from feedbackhook.liao2016.published import error_rates; "
        "assert len(error_rates()) > 30; "
        f"assert main(['report', {str(ROOT / 'analysis/runs/concordance')!r}, '-o', 'report.html']) == 0"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", command], cwd=work, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "run folder: runs/a" in ran.stdout
    assert (work / "runs/a/figures/error.png").is_file()
    assert "<h1" in (work / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tag", "distance", "version"),
    [("v0.2.0", 0, "0.2.0"), ("v0.2.0", 3, "0.2.1.dev3"), (None, 3, "0.2.0.dev3")],
)
def test_the_version_follows_from_the_tag(
    tag: str | None, distance: int, version: str, tmp_path: Path
) -> None:
    """Tags of results count for nothing; a clone without tags, such as a shallow one, has a version too."""

    def git(*words: str) -> None:
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *named, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    git("add", ".")
    if tag is not None:
        git("commit", "--quiet", "--message", "first")
        git("tag", tag)
    for number in range(distance):
        git("commit", "--quiet", "--allow-empty", "--message", str(number))
    git("tag", "evidence-9")
    command = [sys.executable, "-m", "setuptools_scm"]
    ran = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ran.stdout.strip().partition("+")[0] == version


def test_the_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import version

    assert feedbackhook.__version__ == version("feedbackhook")
