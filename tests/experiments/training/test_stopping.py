"""Signals: whichever stops a run, and how often it comes, the run is `interrupted` and can be resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from feedbackhook.cli import main
from feedbackhook.experiments.config import DataConfig, ModelConfig, ProtocolConfig, RecordConfig, RunConfig
from feedbackhook.experiments.training.progress import Progress
from feedbackhook.experiments.training.run import train
from feedbackhook.experiments.training.stopping import Terminated, stoppable, uninterrupted
from feedbackhook.store.run_folder import RunFolder, RunResult

SIGNALS = [(signal.SIGTERM, Terminated, 143), (signal.SIGINT, KeyboardInterrupt, 130)]
each_signal = pytest.mark.parametrize(("number", "kind", "exit_status"), SIGNALS, ids=["SIGTERM", "SIGINT"])


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        data=DataConfig(size=16, train_images=100, test_images=50),
        model=ModelConfig("timm/test_resnet"),
        protocol=ProtocolConfig(epochs=3, batch_size=50, threads=1),
        record=RecordConfig(figures=False),
        output=str(tmp_path / "run"),
    )


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """With Python's own handlers, even if these tests run in the background of a shell, where SIGINT is
    ignored."""
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def status(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(str(config.output)) / "status.json").read_text())
    return content


@each_signal
def test_a_signal_leaves_a_run_interrupted(
    config: RunConfig, number: int, kind: type[BaseException], exit_status: int
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def stop(now: Progress) -> None:
        if (now.epoch, now.batch) == (2, 1):
            send(number)

    with pytest.raises(KeyboardInterrupt) as raised:
        train(config, progress=stop)
    assert raised.type is kind
    assert (status(config)["status"], status(config)["epoch"]) == ("interrupted", 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train(config, resume=True).status == "finished"


@each_signal
def test_a_second_signal_does_not_cut_short_how_a_run_ends(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, number: int, kind: object, exit_status: int
) -> None:
    def impatient(folder: RunFolder, result: RunResult) -> None:
        if result.status == "interrupted":
            send(number)
        write(folder, result)

    write = RunFolder.write_result
    monkeypatch.setattr(RunFolder, "write_result", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=lambda _: send(number))
    assert status(config)["status"] == "interrupted"


def test_a_signal_while_the_last_status_is_written_waits_for_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(folder: RunFolder, result: RunResult) -> None:
        if result.status == "finished":
            send(signal.SIGTERM)
        write(folder, result)

    write = RunFolder.write_result
    monkeypatch.setattr(RunFolder, "write_result", late)
    with pytest.raises(Terminated):
        train(config)
    assert status(config)["status"] == "finished"


def test_a_handler_that_the_program_has_set_stays(config: RunConfig) -> None:
    heard: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        result = train(config, progress=lambda now: send(signal.SIGTERM) if now.epoch == 1 else None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.status == "finished"
    assert set(heard) == {signal.SIGTERM}


def test_a_signal_is_raised_once_and_after_a_block_that_it_may_not_interrupt() -> None:
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            send(signal.SIGTERM)
            send(signal.SIGINT)
            done.append("block")
        done.append("beyond")

    with stoppable(), pytest.raises(Terminated):
        work()
    assert done == ["block"]
    with stoppable():
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        with uninterrupted():
            send(signal.SIGTERM)
        send(signal.SIGINT)  # ignored: the first has been raised


@each_signal
def test_the_command_ends_with_the_status_that_shells_expect(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    kind: object,
    exit_status: int,
) -> None:
    def stop(folder: RunFolder, state: dict[str, Any]) -> None:
        write(folder, state)
        send(number)

    write = RunFolder.write_checkpoint
    monkeypatch.setattr(RunFolder, "write_checkpoint", stop)
    command = [
        "train",
        "--model.name",
        "timm/test_resnet",
        "--data.size",
        "16",
        "--output",
        f"{tmp_path}/run",
    ]
    assert main(command) == exit_status
    assert "--resume" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"
