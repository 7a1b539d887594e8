"""A run that is resumed: bit-equal to one that never stopped, or refused by one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from support.training import at, series, status, train

from feedbackhook.experiments.config import (
    ConfigError,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from feedbackhook.experiments.training import evaluate as evaluation
from feedbackhook.store.recorder import Recorder, read


def test_rows_of_an_epoch_that_was_not_kept_are_not_there_twice(config: RunConfig) -> None:
    """The first watched step of the interrupted epoch has the number of the checkpoint's last."""
    config.record.every = 1
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(2, 2, KeyboardInterrupt))
    train(config, resume=True)
    table = read(str(config.output))
    assert not table.duplicated(["step", "layer", "metric"]).any()
    assert sorted(set(table[table.metric == "error_angle"]["step"])) == list(range(12))


def test_a_run_whose_seed_gave_another_v_is_refused(config: RunConfig) -> None:
    """Its checkpoint is of an earlier stream of random numbers."""
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(2, 2, KeyboardInterrupt))
    path = Path(str(config.output), "checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["patch"]["stream"]
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match=r"cannot resume: .*stream 1 of random.*choose another output"):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("mode", "model", "optimizer"),
    [
        (None, ModelConfig(), OptimizerConfig("sgd", lr=0.01)),
        ("brSF", ModelConfig(batch_norm="paper"), OptimizerConfig(lr=1e-4, setting=3)),
        ("sign", ModelConfig("timm/test_resnet", options={"drop_rate": 0.3}), OptimizerConfig(lr=1e-4)),
        ("KP", ModelConfig(), OptimizerConfig("sgd", lr=0.01)),
        ("WM", ModelConfig(), OptimizerConfig(lr=1e-4)),
        (
            "random",
            ModelConfig("timm/test_vit", options={"img_size": 28, "patch_size": 7}),
            OptimizerConfig("timm/adamw"),
        ),
    ],
    ids=["backprop", "brSF", "dropout", "KP", "WM", "adamw"],
)
@pytest.mark.parametrize(
    "batch",
    [pytest.param(2, id="within-epoch"), pytest.param(None, id="after-evaluation", marks=pytest.mark.slow)],
)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(
    config: RunConfig, mode: str | None, model: ModelConfig, optimizer: OptimizerConfig, batch: int | None
) -> None:
    config = replace(config, feedback=FeedbackConfig(mode), model=model, optimizer=optimizer)
    whole = replace(config, output=f"{config.output}-whole/run")
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(3, batch, KeyboardInterrupt))
    assert (status(config)["status"], status(config)["epoch"]) == ("interrupted", 2)
    torch.manual_seed(1234)  # where the interrupted process left the global generator is of no account
    result = train(config, resume=True)
    assert (result.status, result.epoch) == ("finished", 4)
    assert status(config) == status(whole)
    pandas.testing.assert_frame_equal(read(str(config.output)), read(str(whole.output)))
    for name in ("last", "best"):
        ours, theirs = (load_file(Path(str(c.output)) / f"{name}.safetensors") for c in (config, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (torch.load(Path(str(c.output)) / "checkpoint.pt") for c in (config, whole))
    for key, state in theirs["optimizer"]["state"].items():
        name = "exp_avg" if optimizer.name == "timm/adamw" else "momentum_buffer"
        assert torch.equal(ours["optimizer"]["state"][key][name], state[name])


def test_an_interruption_before_the_first_checkpoint_starts_anew(config: RunConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(0, None, KeyboardInterrupt))
    assert status(config)["status"] == "interrupted"
    assert train(config, resume=True).epoch == 4
    assert read(str(config.output)).query("metric == 'test_error'")["epoch"].tolist() == [0, 1, 2, 3, 4]


def test_a_failed_run_says_why_and_can_go_on(config: RunConfig) -> None:
    with pytest.raises(ZeroDivisionError):
        train(config, progress=at(2, 1, ZeroDivisionError))
    assert status(config)["status"] == "failed"
    assert status(config)["reason"] == "ZeroDivisionError: stop here"
    assert train(config, resume=True).status == "finished"


def test_a_finished_run_is_neither_overwritten_nor_repeated(config: RunConfig) -> None:
    config.protocol.epochs = 1
    first = train(config)
    weights = (Path(str(config.output)) / "last.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"holds a run \(finished, epoch 1\): resume it with --resume"):
        train(config)
    assert train(config, resume=True, progress=at(0, None, AssertionError)) == first
    assert (Path(str(config.output)) / "last.safetensors").stat().st_mtime_ns == weights


def test_a_run_does_not_go_on_under_another_configuration(config: RunConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(2, 1, KeyboardInterrupt))
    other = replace(config, optimizer=replace(config.optimizer, lr=1e-3))
    with pytest.raises(ConfigError, match=r"`optimizer\.lr` was 0\.0002 in this run and is 0\.001 now"):
        train(other, resume=True)
    other = replace(config, feedback=FeedbackConfig("frSF", {"concordance": 0.5}))
    with pytest.raises(ConfigError, match=r"`feedback\.options"):
        train(other, resume=True)
    # the number of threads that the run began with is kept where none is asked for
    assert train(replace(config, protocol=replace(config.protocol, threads=None)), resume=True).epoch == 4


def test_a_folder_with_other_things_is_left_alone(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not a run folder and is not empty"):
            train(config, resume=resume)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_folder_in_use_is_refused(config: RunConfig) -> None:
    with Recorder(str(config.output)), pytest.raises(ConfigError, match="being written by another run"):
        train(config)


@pytest.mark.parametrize("file", ["status.json", "config.yaml", "checkpoint.pt"])
def test_a_damaged_run_folder_is_one_clear_error(config: RunConfig, file: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(1, 1, KeyboardInterrupt))
    (Path(str(config.output)) / file).write_text("{")
    with pytest.raises(ConfigError, match=file):
        train(config, resume=True)


@pytest.mark.parametrize(("keep", "kept"), [("best", {"best.safetensors"}), ("none", set())])
def test_a_run_keeps_the_weights_it_is_told_to_and_resumes_without(
    config: RunConfig, keep: Any, kept: set[str]
) -> None:
    folder = Path(str(config.output))
    whole = train(replace(config, output=f"{config.output}-all"))
    config.record.weights = keep
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=at(3, 1, KeyboardInterrupt))
    assert (folder / "checkpoint.pt").exists()
    result = train(config, resume=True)
    assert (result.epoch, result.best_error) == (4, whole.best_error)
    assert {p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".pt")} == kept
    for name in kept:
        ours, theirs = load_file(folder / name), load_file(whole.folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert train(config, resume=True) == result  # it has ended, and needs no checkpoint to say so
    with pytest.raises(ConfigError, match=r"record\.weights"):
        train(replace(config, record=replace(config.record, weights="all")), resume=True)


def test_resuming_a_finished_run_draws_missing_figures(tmp_path):
    config = RunConfig(output=str(tmp_path / "run"))
    config.protocol.epochs = 1
    figures = train(config).figures
    for path in figures:
        path.unlink()
    assert train(config, resume=True).figures == figures


def without_protocol(folder):
    (folder / "config.yaml").write_text("data: {name: digits}\n")


def with_another_checkpoint(folder):
    torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")


def without_table(folder):
    for part in (folder / "metrics").glob("*.parquet"):
        part.unlink()


def without_the_checkpoints_epoch(folder):
    for part in sorted((folder / "metrics").glob("*.parquet"))[1:]:
        part.unlink()


def with_a_truncated_part(folder):
    part = sorted((folder / "metrics").glob("*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:50])


@pytest.mark.parametrize(
    "damage",
    [
        without_protocol,
        with_another_checkpoint,
        without_table,
        without_the_checkpoints_epoch,
        with_a_truncated_part,
    ],
)
def test_a_damaged_run_is_not_gone_on_with(damage, tmp_path, monkeypatch):
    config = RunConfig(output=str(tmp_path / "run"))
    config.protocol.epochs = 2
    evaluate = evaluation.loss_and_error

    def interrupt(run, split, recorder):
        if run.epoch == 2:
            raise KeyboardInterrupt
        return evaluate(run, split, recorder)

    with monkeypatch.context() as context:
        context.setattr(evaluation, "loss_and_error", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    damage(tmp_path / "run")
    with pytest.raises(ConfigError, match="run"):
        train(config, resume=True)


def test_augmented_runs_go_on_as_if_they_had_not_stopped(config: RunConfig) -> None:
    config.data.augmentation = {"scale": [0.5, 1], "hflip": 0.5, "color_jitter": 0.4, "re_prob": 0.3}
    config.record.figures = False
    whole = train(config)
    interrupted = replace(config, output=f"{config.output}-interrupted")
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, progress=at(3, 2, KeyboardInterrupt))
    again = train(interrupted, resume=True)
    plain = train(
        replace(config, data=replace(config.data, augmentation=None), output=f"{config.output}-plain")
    )
    losses = [series(read(result.folder), "train_loss") for result in (whole, again, plain)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    weights = [load_file(r.folder / "last.safetensors")["fc1.weight"] for r in (whole, again)]
    assert torch.equal(*weights)
