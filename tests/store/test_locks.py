"""A run folder is written by one process at a time, and others can ask which."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from feedbackhook.store.locks import holder
from feedbackhook.store.recorder import Recorder, read


def test_two_recorders_on_one_folder_are_refused(tmp_path: Path) -> None:
    with Recorder(tmp_path), pytest.raises(BlockingIOError, match="being written by another run"):
        Recorder(tmp_path)
    Recorder(tmp_path).close()  # it holds no table


def test_the_process_at_work_in_a_folder_is_named(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with Recorder(tmp_path), Recorder(tmp_path / "other"):
        me = f"process {os.getpid()} on {socket.gethostname()}"
        assert holder(tmp_path) == me
        with pytest.raises(BlockingIOError, match=re.escape(f"another run ({me})")):
            Recorder(tmp_path)
    assert (tmp_path / "metrics" / ".lock").read_text().strip() == me  # nobody holds it, whatever it says
    assert holder(tmp_path) is None


def test_the_lock_file_is_touched_once_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("feedbackhook.store.recorder.time.monotonic", lambda: now)
    with Recorder(tmp_path, interval=30) as recorder:
        lock = tmp_path / "metrics" / ".lock"
        os.utime(lock, (1, 1))
        recorder.touch_if_due()
        assert lock.stat().st_mtime == 1
        now += 30
        recorder.touch_if_due()
        assert lock.stat().st_mtime > 1
        os.utime(lock, (1, 1))
        recorder.touch_if_due()
        assert lock.stat().st_mtime == 1


def test_a_process_that_was_forked_off_does_not_keep_the_folder(tmp_path: Path) -> None:
    """As a data loader's workers are, which may outlive the recorder."""
    with Recorder(tmp_path) as recorder:
        recorder.add(0, 0, "loss", 1.0)
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
    try:
        with Recorder(tmp_path, append=True) as again:
            again.add(1, 0, "loss", 0.5)
        assert read(tmp_path)["value"].tolist() == [1.0, 0.5]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
