"""Runs as tables: what each is, its rows, and by name whatever is left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from support.run_folders import leave_run

from feedbackhook.experiments.config import FeedbackConfig, ProtocolConfig, RunConfig
from feedbackhook.report.runs import collect
from feedbackhook.store.errors import StoreError
from feedbackhook.store.run_folder import RunFolder, RunResult

CURVE = [(90.0, 90.0), (20.0, 21.0), (30.0, 31.0)]


def run(output: Path, condition: str | None = "frSF+BN+BM concordance=0.5", seed: int = 0) -> RunConfig:
    protocol = ProtocolConfig(epochs=2, seed=seed, threads=1)
    return RunConfig(condition, protocol=protocol, output=str(output))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    leave_run(run(tmp_path / "a"), CURVE, 2)
    leave_run(run(tmp_path / "deep" / "b", "SGD Top", 3), CURVE[:1], 2)
    return tmp_path


def test_a_run_is_described_by_its_configuration_and_status(two: Path) -> None:
    runs = collect(two).runs.set_index("run")
    assert sorted(runs.index) == ["a", "b"]
    a, b = runs.loc["a"], runs.loc["b"]
    assert (a["condition"], a["rule"], a["concordance"]) == ("frSF+BN+BM concordance=0.5", "frSF", 0.5)
    assert (a["dataset"], a["model"], a["batch_norm"], a["seed"]) == ("digits", "liao2016/mnist", "paper", 0)
    assert (a["status"], a["best_error"], a["last_error"]) == ("finished", 20.0, 30.0)
    assert (b["status"], b["frozen"], b["seed"]) == ("diverged", "Top", 3)
    assert pd.isna(b["rule"])
    assert pd.isna(b["concordance"])


def test_rows_are_those_of_the_metrics_that_are_asked_for(two: Path) -> None:
    found = collect(two)
    errors = found.rows(["test_error"])
    assert errors.groupby("run")["value"].apply(list).to_dict() == {"a": [90.0, 20.0, 30.0], "b": [90.0]}
    assert set(errors["metric"]) == {"test_error"}
    assert set(found.rows(["test_error", "val_error"])["metric"]) == {"test_error", "val_error"}
    angles = found.rows(of_layers=["weight_angle"])
    assert angles[angles["run"] == "b"][["layer", "depth", "value"]].to_numpy().tolist() == [
        ["conv1", 0, 45.0],
        ["fc2", 1, 46.0],
    ]
    assert found.rows(["weight_angle"]).empty
    assert found.rows(["nothing"]).empty


def test_rows_are_read_when_they_are_asked_for(two: Path) -> None:
    found = collect(two)
    assert found.skipped == {}
    (two / "a" / "metrics" / "part-00000.parquet").unlink()
    assert set(found.rows(["test_error"])["run"]) == {"b"}
    assert found.skipped == {"a": "its table is gone"}


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path: Path) -> None:
    for sweep in ("first", "second"):
        leave_run(run(tmp_path / sweep / "a"), CURVE, 2)
    assert sorted(collect(tmp_path).runs["run"]) == ["first/a", "second/a"]
    assert set(collect(tmp_path / "first", tmp_path / "second").rows(["test_error"])["run"]) == {
        "first/a",
        "second/a",
    }
    assert collect(tmp_path / "first", tmp_path / "first" / "a").runs["run"].tolist() == ["a"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF  # within the first page, which the footer does not show
    path.write_bytes(content)


def _old_config(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    del content["data"]["val_fraction"]
    content["provenance"]["versions"]["feedbackhook"] = "0.0.9"
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def _other_columns(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"step": [1]}), folder / "metrics" / "part-00000.parquet")


def _status(status: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        RunFolder(folder).write_result(RunResult(folder, status, "stopped", epoch=1))  # type: ignore[arg-type]

    return write


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: _cut(f / "metrics" / "part-00000.parquet"), "part-00000.parquet"),
        (lambda f: _flip(f / "metrics" / "part-00000.parquet"), "its table is damaged"),
        (lambda f: (f / "metrics" / "part-00000.parquet").unlink(), "it has no table"),
        (
            lambda f: os.replace(f / "metrics" / "part-00000.parquet", f / "metrics" / "part-00001.parquet"),
            "missing",
        ),
        (_other_columns, "another version: it has the columns ['step']"),
        (_old_config, "belongs to another version (0.0.9): its config.yaml has no data.val_fraction"),
        (lambda f: (f / "config.yaml").write_text("nothing: ["), "config.yaml is damaged"),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml is damaged"),
        (lambda f: (f / "status.json").write_text("{"), "status.json is damaged"),
        (_status("running"), "running after 1 epochs: stopped"),
        (_status("failed"), "failed after 1 epochs: stopped"),
        (_status("interrupted"), "interrupted after 1 epochs: stopped"),
    ],
    ids=[
        "cut",
        "flipped",
        "no_table",
        "part_lost",
        "columns",
        "version",
        "config",
        "no_config",
        "status",
        "running",
        "failed",
        "interrupted",
    ],
)
def test_what_cannot_be_used_is_named_with_its_reason_and_the_rest_is_read(
    two: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(two / "a")
    found = collect(two)
    assert set(found.rows(["test_error"])["run"]) == {"b"}
    assert list(found.skipped) == ["a"]
    assert reason in found.skipped["a"]


def test_a_run_that_was_stopped_before_it_began_is_empty(two: Path) -> None:
    (two / "c" / "metrics").mkdir(parents=True)
    assert collect(two).skipped == {"c": "it is empty: it was stopped before it started"}


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "nowhere is not a folder"), ("empty", "no run in")]
)
def test_a_folder_without_runs_is_one_clear_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=message):
        collect(tmp_path / path)


def test_the_concordance_of_a_rule_that_has_one_is_1_unless_it_is_given(tmp_path: Path) -> None:
    leave_run(run(tmp_path / "a", "brSF"), CURVE, 2)
    config = run(tmp_path / "b", None)
    config.feedback = FeedbackConfig("sign", {"concordance": 0.25})
    leave_run(config, CURVE, 2)
    leave_run(run(tmp_path / "c", "RndF"), CURVE, 2)
    assert collect(tmp_path).runs["concordance"].tolist()[:2] == [1.0, 0.25]
    assert pd.isna(collect(tmp_path).runs["concordance"].iloc[2])
