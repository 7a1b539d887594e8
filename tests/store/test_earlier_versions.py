"""A run of an earlier version is refused by one clear error that gives the new names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.run_folders import leave_run

from feedbackhook.cli import main
from feedbackhook.experiments.config import ConfigError, ProtocolConfig, RunConfig
from feedbackhook.experiments.training.run import train
from feedbackhook.report.runs import collect
from feedbackhook.store.errors import StoreError
from feedbackhook.store.recorder import Recorder, read
from feedbackhook.store.run_folder import RunFolder

RENAMED = {
    ("data", "val_fraction"): "held_out",
    ("model", "trainable"): "trained",
    ("protocol", "lr_factor"): "rate_factor",
    ("protocol", "gradient_accumulation_steps"): "accumulation",
    ("protocol", "lr_schedule"): "schedule",
}
MESSAGE = (
    "config.yaml was written by an earlier version of feedbackhook: data.held_out is now data.val_fraction, "
    "model.trained is now model.trainable, protocol.rate_factor is now protocol.lr_factor, "
    "protocol.accumulation is now protocol.gradient_accumulation_steps, protocol.schedule is now "
    "protocol.lr_schedule"
)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A finished run whose config.yaml has the keys of the version before."""
    config = RunConfig(protocol=ProtocolConfig(epochs=1), output=str(tmp_path / "run"))
    path = leave_run(config, [(90.0, 90.0), (10.0, 11.0)], epochs=1) / "config.yaml"
    stored: dict[str, Any] = yaml.safe_load(path.read_text())
    for (section, new), old in RENAMED.items():
        stored[section][old] = stored[section].pop(new)
    path.write_text(yaml.safe_dump(stored, sort_keys=False))
    return config


def test_its_configuration_is_refused_with_the_new_names(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=MESSAGE):
        RunFolder(tmp_path / "run").stored_config()


def test_it_is_not_resumed(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=f"{MESSAGE}: choose another output"):
        train(config, resume=True)


def test_a_report_leaves_it_out_and_says_why(config: RunConfig, tmp_path: Path) -> None:
    found = collect(tmp_path)
    assert found.runs.empty
    assert MESSAGE in found.skipped["run"]


@pytest.mark.parametrize(("old", "new"), [("held_out_error", "val_error"), ("held_out_loss", "val_loss")])
def test_its_table_is_refused_with_the_new_name(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder(tmp_path / "run") as recorder:
        recorder.add(0, 0, "test_error", 90.0)
        recorder.add(0, 0, old, 90.0)
    message = f"metrics was written by an earlier version of feedbackhook: {old} is now {new}"
    with pytest.raises(StoreError, match=message):
        read(tmp_path / "run")
    assert main(["plot", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
