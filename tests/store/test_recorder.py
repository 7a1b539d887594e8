"""The tidy table: what is added is what is read, and nothing is lost, doubled or skipped in silence."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

import feedbackhook
from feedbackhook.store.recorder import COLUMNS, Recorder, read


def fill(folder: Path, epochs: range) -> None:
    """Two rows an epoch of ten steps, one part an epoch."""
    with Recorder(folder, append=epochs.start > 0) as recorder:
        for epoch in epochs:
            recorder.add(10 * epoch, epoch, "test_error", 50.0 / (epoch + 1))
            recorder.add(10 * epoch, epoch, "weight_angle", 45.0 + epoch, layer="conv1", depth=0)
            recorder.flush()


def parts(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "metrics").glob("*"))


def test_what_is_added_is_read(tmp_path: Path) -> None:
    fill(tmp_path / "frSF-0", range(3))
    table = read(tmp_path / "frSF-0")
    assert tuple(table.columns) == COLUMNS
    assert table["run"].unique().tolist() == ["frSF-0"]
    angles = table[table.metric == "weight_angle"]
    assert angles[["step", "epoch", "layer", "depth", "value"]].values.tolist() == [
        [0, 0, "conv1", 0, 45.0],
        [10, 1, "conv1", 0, 46.0],
        [20, 2, "conv1", 0, 47.0],
    ]
    errors = table[table.metric == "test_error"]
    assert errors["layer"].isna().all()
    assert errors["depth"].isna().all()
    assert table["depth"].dtype == pandas.Int64Dtype()


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for value in (math.nan, math.inf, -math.inf):
            recorder.add(0, 0, "train_loss", value)
    values = read(tmp_path)["value"].tolist()
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]


def test_a_folder_of_runs_is_one_table(tmp_path: Path) -> None:
    fill(tmp_path / "sgd", range(1))
    fill(tmp_path / "nested" / "uSF", range(2))
    assert read(tmp_path).groupby("run").size().to_dict() == {"sgd": 2, "uSF": 4}


def test_two_runs_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "sgd", range(1))
    fill(tmp_path / "b" / "sgd", range(1))
    with pytest.raises(ValueError, match="two runs are named 'sgd'"):
        read(tmp_path)
    assert len(read(tmp_path / "a")) == 2


def test_the_runs_name_can_be_given(tmp_path: Path) -> None:
    with Recorder(tmp_path, run="backprop") as recorder:
        recorder.add(0, 0, "train_loss", 1.0)
    assert read(tmp_path)["run"].tolist() == ["backprop"]


def test_a_second_recorder_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    fill(tmp_path, range(2, 4))
    assert read(tmp_path)["epoch"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_table_is_not_added_to_unasked(tmp_path: Path) -> None:
    """As by a cell of a notebook that runs twice."""
    fill(tmp_path, range(2))
    for _ in range(2):  # the folder is not left in use
        with pytest.raises(FileExistsError, match=rf"{tmp_path} already holds the table .* append=True"):
            Recorder(tmp_path)
    assert read(tmp_path)["epoch"].tolist() == [0, 0, 1, 1]


def test_rows_after_a_step_are_dropped_and_made_anew(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    with Recorder(tmp_path, append=True) as recorder:
        recorder.add(30, 3, "not yet written", 1.0)
        recorder.drop_after(10)
    assert read(tmp_path)["epoch"].tolist() == [0, 0, 1, 1]
    fill(tmp_path, range(2, 4))
    assert read(tmp_path)["epoch"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_rows_of_a_later_epoch_are_dropped_at_the_same_step(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.add(5, 1, "loss", 1.0)
        recorder.add(5, 2, "angle", 2.0)
        recorder.flush()
        recorder.add(5, 2, "norm", 3.0)
        recorder.drop_after(5, epoch=1)
    assert read(tmp_path)["metric"].tolist() == ["loss"]


def test_rows_go_to_disk_when_the_interval_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("feedbackhook.store.recorder.time.monotonic", lambda: now)
    with Recorder(tmp_path, interval=10) as recorder:
        recorder.add(0, 0, "loss", 1.0)
        now += 9
        recorder.add(1, 0, "loss", 1.0)
        assert not list(tmp_path.rglob("*.parquet"))
        now += 1
        recorder.add(2, 0, "loss", 1.0)
        assert read(tmp_path)["step"].tolist() == [0, 1, 2]
        recorder.add(3, 0, "loss", 1.0)
        assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Recorder(tmp_path / "other") as recorder, Recorder(tmp_path / "other"):
        recorder.add(0, 0, "loss", 1.0)
        recorder.flush()
        recorder.drop_after(-1)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="closed"):
        recorder.add(1, 0, "loss", 1.0)
    monkeypatch.setenv("RANK", "0")
    with Recorder(tmp_path / "first") as recorder:
        recorder.add(0, 0, "loss", 1.0)
    assert len(read(tmp_path / "first")) == 1


def test_tensorboard_gets_scalars_and_histograms(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path, tensorboard=True) as recorder:
        feedbackhook.patch(model, "sign").watch(1, recorder)
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    table = read(tmp_path)
    (scalar,) = events.Scalars("error_angle/2")
    row = table[(table.metric == "error_angle") & (table.layer == "2")]
    assert scalar.value == pytest.approx(row["value"].item())
    assert {"V/2", "W/2", "gradient/2"} <= set(events.Tags()["histograms"])


def test_a_part_is_cut_where_the_step_lies_within_it(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.add(step, 1, "train_loss", step)
        recorder.flush()
        recorder.add(2, 1, "late", 0.0)
        recorder.flush()
        recorder.drop_after(2)
        recorder.add(3, 1, "train_loss", -3.0)
    assert read(tmp_path)["value"].tolist() == [1.0, 2.0, 0.0, -3.0]


def test_a_part_emptied_in_the_middle_leaves_no_gap(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in (1, 9, 2):
            recorder.add(step, 1, "train_loss", step)
            recorder.flush()
        recorder.drop_after(2)
    assert read(tmp_path)["value"].tolist() == [1.0, 2.0]


def test_dropping_everything_leaves_no_table(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    with Recorder(tmp_path, append=True) as recorder:
        recorder.drop_after(-1)
    with pytest.raises(FileNotFoundError, match="no table in"):
        read(tmp_path)


def test_nothing_there_is_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, range(3))
    part = tmp_path / "metrics" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    if damage == "cut":
        part.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        part.write_bytes(b"")
    elif damage == "flipped":
        data[30] ^= 0xFF
        part.write_bytes(data)
    else:
        pandas.DataFrame({"x": [1]}).to_parquet(part)
    with pytest.raises(ValueError, match=r"part-00001\.parquet"):
        read(tmp_path)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (tmp_path / "metrics" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"part-00001\.parquet is missing"):
        read(tmp_path)


def test_rows_before_an_error_are_kept_and_the_folder_is_free(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)

    def run() -> None:
        with recorder:
            recorder.add(1, 1, "train_loss", 2.5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert read(tmp_path)["value"].tolist() == [2.5]
    with pytest.raises(ValueError, match="closed"):
        recorder.add(2, 1, "train_loss", 2.0)
    recorder.close()


WRITER = """
import sys
from feedbackhook.store.recorder import Recorder

recorder = Recorder(sys.argv[1])
for step in range(10**9):
    recorder.add(step, step // 10, "train_loss", step / 2)
    if step % 10 == 9:
        recorder.flush()
        print(step, flush=True)
"""


def test_a_killed_process_loses_at_most_its_last_interval_and_its_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        flushed = int(process.stdout.readline())
    with pytest.raises(BlockingIOError):
        Recorder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    flushed = max([flushed, *map(int, process.stdout.read().split())])
    assert process.wait() == -signal.SIGKILL

    table = read(tmp_path)
    steps = table["step"].tolist()
    assert steps == list(range(len(steps)))
    # the part that was renamed just before the kill may not have been announced
    assert len(steps) in (flushed + 1, flushed + 11)
    assert table["value"].tolist() == [step / 2 for step in steps]

    (tmp_path / "metrics" / ".part-00099.parquet.1").write_bytes(b"PAR1 unfinished")
    Recorder(tmp_path, append=True).close()
    assert parts(tmp_path) == [".lock", *(f"part-{i:05d}.parquet" for i in range(len(steps) // 10))]


def test_the_package_needs_neither_pandas_nor_pyarrow_to_be_imported() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['pandas', 'pyarrow', 'timm', 'jsonargparse', 'rich']))\n"
        "import feedbackhook, feedbackhook.optim, feedbackhook.store.recorder as recorder\n"
        "for attempt in (lambda: recorder.Recorder('unused'), lambda: recorder.read('unused')):\n"
        "    try:\n"
        "        attempt()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message = "the tidy table needs pyarrow: pip install 'feedbackhook[experiments]'"
    assert done.stdout.splitlines() == [message] * 2
