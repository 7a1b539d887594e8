"""A run's rows in trackio and in wandb, as the real packages read them back."""

from __future__ import annotations

import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feedbackhook.store.recorder import Recorder

ROWS = [  # step, epoch, metric, value, layer, depth
    (0, 0, "test_error", 90.0, None, None),
    (2, 1, "train_loss", 0.5, None, None),
    (2, 1, "weight_angle", 45.0, "fc1", 0),
    (1, 1, "late", 7.0, None, None),  # steps may go back
]
EXPECTED = {
    0: {"test_error": 90.0, "epoch": 0},
    2: {"train_loss": 0.5, "weight_angle/fc1": 45.0, "epoch": 1},
    1: {"late": 7.0, "epoch": 1},
}


def record(folder: Path, package: Any) -> None:
    settings = {"model": {"name": "liao2016/mnist"}}
    with Recorder(folder, append=True, tracking=package, settings=settings) as recorder:
        for step, epoch, metric, value, layer, depth in ROWS:
            recorder.add(step, epoch, metric, value, layer, depth)


def test_trackio_has_every_row_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in ("trackio.sqlite_storage", "trackio.utils"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    record(tmp_path / "sweep" / "run", "trackio")
    (name,) = storage.SQLiteStorage.get_runs("sweep")
    assert name.startswith("run-")
    logs = storage.SQLiteStorage.get_logs("sweep", name)
    found = {log["step"]: {k: v for k, v in log.items() if k not in ("step", "timestamp")} for log in logs}
    assert found == EXPECTED
    config = storage.SQLiteStorage.get_run_config("sweep", name)
    assert config["model"] == {"name": "liao2016/mnist"}
    assert capsys.readouterr().out == ""


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which wandb uses: blocks of 32 kB, in which each piece
    has its checksum (4 bytes), its length (2) and its kind (1): 1 whole, 2 first, 3 middle, 4 last."""
    place, whole = 7, b""  # after wandb's own header
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            return  # it is being written
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def written(file: Path) -> list[Any]:
    """The records of a file of wandb, whose own process writes the last of them after the run's end."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + 60
    while True:
        found = [Record.FromString(data) for data in records(file.read_bytes())]
        if (found and found[-1].HasField("exit")) or time.monotonic() > until:
            return found
        time.sleep(0.1)


def test_wandb_has_every_row_and_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    record(tmp_path / "sweep" / "run", "wandb")
    (file,) = (tmp_path / "sweep" / "run" / "wandb").glob("offline-run-*/*.wandb")
    found, runs, config = {}, set(), {}
    for row in written(file):
        if row.HasField("run"):
            runs.add((row.run.project, row.run.display_name[:4]))
            config |= {item.key: json.loads(item.value_json) for item in row.run.config.update}
        if row.HasField("history"):
            values = {"/".join(i.nested_key) or i.key: float(i.value_json) for i in row.history.item}
            values = {key: value for key, value in values.items() if not key.startswith("_")}
            found[int(values.pop("step"))] = values
    assert found == EXPECTED
    assert runs == {("sweep", "run-")}
    assert config["model"] == {"name": "liao2016/mnist"}


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_and_the_folder_is_free(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'feedbackhook\[{package}\]'"):
        record(tmp_path, package)
    with Recorder(tmp_path) as recorder:  # not in use
        recorder.add(0, 0, "test_error", math.pi)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'trackio' or 'wandb', not 'mlflow'"):
        Recorder(tmp_path / "run", tracking="mlflow")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
