"""The manifest of a sweep: read as it was written, and refused with one clear error."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from feedbackhook.store import manifest
from feedbackhook.store.errors import StoreError
from feedbackhook.store.manifest import Manifest, ManifestCondition, ManifestRun, Published, PublishedPoint

EXAMPLE = Manifest(
    datasets={"MNIST": "", "mine": "made by ourselves: \u00e9"},
    conditions={"SGD": ManifestCondition(None, "SGD"), "frSF": ManifestCondition("frSF", "frSF", 1.0)},
    reference="SGD",
    epochs=3,
    batch_size=100,
    batch_sizes={2: 200},
    seed=4,
    seeds=2,
    val_fraction=0.1,
    published=Published(
        "A. Author 2000",
        "Author 2000",
        "SGD",
        {"MNIST": {"SGD": 0.67}},
        [PublishedPoint("MNIST", "frSF", 0.5, 1.25)],
    ),
    runs=[
        ManifestRun("a", "MNIST", "SGD", 10.0, 0.1 * 10.0, 4, 100),
        ManifestRun("b", "mine", "frSF", 1.0, 0.1, 5, 100, {2: 200, 3: 500}, "batch500"),
    ],
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert not manifest.exists(tmp_path)
    manifest.write(EXAMPLE, tmp_path)
    assert manifest.exists(tmp_path)
    assert manifest.read(tmp_path) == EXAMPLE
    lines = (tmp_path / "manifest.json").read_text(encoding="utf-8").splitlines()
    assert sum('"lr_factor"' in line for line in lines) == len(EXAMPLE.runs)  # one line for each run


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest.write(EXAMPLE, tmp_path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        manifest.write(replace(EXAMPLE, seed=9), tmp_path)
    assert manifest.read(tmp_path) == EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"version": 1}', '{"version": 1, "runs": [{}]}'])
def test_a_damaged_one_says_how_to_write_it_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    command = f"feedbackhook sweep {tmp_path}/sweep.yaml --output {tmp_path}"
    with pytest.raises(StoreError, match=r"manifest\.json is damaged") as error:
        manifest.read(tmp_path)
    assert command in str(error.value)


def test_one_of_another_version_is_refused(tmp_path: Path) -> None:
    manifest.write(EXAMPLE, tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(StoreError, match="has version 99, but this feedbackhook reads 1"):
        manifest.read(tmp_path)


def test_a_folder_without_one_is_told_by_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no sweep: there is no"):
        manifest.read(tmp_path)
    with pytest.raises(StoreError, match="there is no folder"):
        manifest.read(tmp_path / "nowhere")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(StoreError, match="is a single run, not a sweep: `feedbackhook plot"):
        manifest.read(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "sweep.yaml").touch()
    (tmp_path / "run").mkdir()
    with pytest.raises(StoreError, match=r"has a sweep\.yaml but no manifest\.json: run `feedbackhook sweep"):
        manifest.read(tmp_path)
    with pytest.raises(StoreError, match="holds no sweep, but is a run of the one in"):
        manifest.read(tmp_path / "run")
