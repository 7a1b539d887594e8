"""A run from end to end on a tiny dataset: what it leaves, and how it can end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.bounds import HALF_OF_FLOAT32, of_angle, of_share
from support.training import at, series, status, train

from feedbackhook import get_patch
from feedbackhook.experiments.config import (
    FeedbackConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.data.load import load
from feedbackhook.experiments.data.split import Split
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training import evaluate as evaluation
from feedbackhook.experiments.training import state
from feedbackhook.report.plots import FIGURES
from feedbackhook.store.recorder import Recorder, read


def test_a_run_leaves_its_folder(config: RunConfig) -> None:
    config.record.every = 3
    result = train(config)
    folder = Path(str(config.output))
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "config.yaml",
        "checkpoint.pt",
        "best.safetensors",
        "last.safetensors",
        "status.json",
        "metrics/.lock",
        *(f"metrics/part-0000{i}.parquet" for i in range(5)),
        *(
            f"figures/{name}.png"
            for name in FIGURES
            if not name.startswith(("gradient", "accuracy", "checks"))
        ),
    }
    assert (result.status, result.epoch, result.step) == ("finished", 4, 12)
    assert status(config) == {k: v for k, v in vars(result).items() if k != "folder"}
    assert [path.stem for path in result.figures] == sorted(
        path.stem for path in (folder / "figures").iterdir()
    )

    table = read(folder)
    assert set(table["run"]) == {"run"}
    errors = table[table.metric == "test_error"]
    assert errors[["step", "epoch"]].values.tolist() == [[3 * e, e] for e in range(5)]
    assert result.last_error == errors["value"].iloc[-1]
    assert result.best_error == errors["value"].iloc[1:].min()
    assert series(table, "test_accuracy") == [100 - e for e in errors["value"]]
    # the paper's 50 and 60 of 65 epochs are 3 and 4 of 4
    np.testing.assert_allclose(series(table, "learning_rate"), [2e-4, 2e-4, 2e-4, 2e-5])
    assert len(series(table, "train_loss")) == len(series(table, "train_error")) == 4
    layers = enumerate(["conv1", "conv2", "fc1", "fc2"])
    # watched before the updates 0, 3, 6 and 9, which are the first of their epoch; V and W also at the end
    watched = [(3 * e, e + 1, name, depth) for depth, name in layers for e in range(4)]
    last = [(12, 4, name, depth) for _, _, name, depth in watched[::4]]
    for metric, expected in (
        ("error_angle", watched),
        ("weight_norm", watched),
        ("gradient_norm", watched),
        *((metric, watched + last) for metric in ("weight_angle", "sign_agreement", "norm_ratio")),
    ):
        rows = table[(table.metric == metric) & table.layer.notna()]
        found = sorted(zip(rows["step"], rows["epoch"], rows["layer"], rows["depth"], strict=True))
        assert found == sorted(expected), metric
    assert not table.duplicated(["step", "layer", "metric"]).any()


def test_the_recorded_angles_are_those_of_the_definition(config: RunConfig) -> None:
    config.protocol.epochs = 1
    train(config)
    first = read(str(config.output)).query("step == 0 and layer == 'fc1'").set_index("metric")["value"]
    assert first["weight_angle"] == pytest.approx(
        41.41, abs=of_angle(400_000)
    )  # uniform W, Liao et al.'s M o sign(W)
    assert first["expected_weight_angle"] == pytest.approx(first["weight_angle"], abs=of_angle(400_000))
    assert first["sign_agreement"] == 1.0


def test_gradient_angles_are_measured_where_asked_for_and_change_nothing(config: RunConfig) -> None:
    config.record = RecordConfig(every=3)
    plain = train(config)
    config.record = RecordConfig(every=2, gradient_angle_every=4, per_sample=True)
    measured = train(replace(config, output=f"{config.output}-measured"))
    assert measured.last_error == plain.last_error
    losses = [series(read(result.folder), "train_loss") for result in (plain, measured)]
    assert losses[0] == losses[1]
    table = read(measured.folder)
    angles = table[table.metric == "gradient_angle"]
    assert sorted(set(angles["step"])) == [0, 4, 8, 11]  # and in the last step
    assert (angles[angles.layer == "fc2"]["value"] == 0).all()
    assert (angles[angles.layer == "conv1"]["value"] > 1).all()
    assert {"error_angle_per_sample", "error_angle_samples"} < set(table["metric"])
    assert {path.stem for path in measured.figures} == set(FIGURES) - {"checks"}


def test_config_yaml_says_all_that_the_run_was(config: RunConfig) -> None:
    config.protocol.epochs = 1
    config.feedback.options = {"concordance": 0.75}
    train(config)
    stored = yaml.safe_load((Path(str(config.output)) / "config.yaml").read_text())
    assert stored["feedback"] == {
        "mode": "frSF",
        "options": {"concordance": 0.75},
        "schedule": {},
        "include": None,
        "exclude": None,
        "seed": 0,
        "recompute": False,
        "fused": False,
        "lr": None,
        "mirror": 0,
    }
    assert stored["protocol"]["milestones"] == [1, 1]
    assert stored["protocol"]["device"] in ("cpu", "cuda")
    assert stored["data"]["size"] == 28
    assert stored["provenance"]["versions"]["torch"] == torch.__version__
    assert set(stored["provenance"]) == {"versions", "machine", "command"}


def test_the_kept_weights_are_the_best_and_the_last(config: RunConfig) -> None:
    config.optimizer.lr = 3e-3  # rough, so that best and last differ
    result = train(config)
    assert result.best_epoch is not None
    folder = Path(str(config.output))
    last, checkpoint = load_file(folder / "last.safetensors"), torch.load(folder / "checkpoint.pt")
    assert last.keys() == checkpoint["model"].keys()
    assert all(torch.equal(last[name], checkpoint["model"][name]) for name in last)
    shorter = replace(config, output=f"{config.output}-best", protocol=replace(config.protocol))
    shorter.protocol.milestones = [epoch for epoch in (3, 4) if epoch <= result.best_epoch]
    shorter.protocol.epochs = result.best_epoch
    train(shorter)
    best = load_file(folder / "best.safetensors")
    expected = load_file(Path(str(shorter.output)) / "last.safetensors")
    assert all(torch.equal(best[name], expected[name]) for name in expected)


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_diverged_run_ends_with_its_table(
    config: RunConfig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "training":
        config = replace(config, feedback=FeedbackConfig("uSF"), optimizer=OptimizerConfig("sgd", lr=100.0))
    else:
        tested = iter([(0.7, 60.0), (0.6, 20.0), (math.nan, 50.0)])
        monkeypatch.setattr(evaluation, "loss_and_error", lambda *_: next(tested))
    result = train(config)
    assert result.status == "diverged"
    metric = "train_loss" if where == "training" else "test_loss"
    assert result.reason is not None
    assert result.reason.startswith(f"{metric.replace('_', ' ')} is ")
    table = read(str(config.output))
    row = table.iloc[-1]
    assert row["metric"] == metric
    assert not math.isfinite(row["value"])
    assert f"in epoch {row['epoch']}, after {row['step']} steps" in result.reason
    assert result.last_error == series(table, "test_error")[-1]
    if where == "evaluation":
        assert (result.epoch, result.last_error, result.best_error) == (1, 20.0, 20.0)
    assert (Path(str(config.output)) / "figures" / "error.png").exists()
    assert train(config, resume=True, progress=at(0, None, AssertionError)) == result


def test_the_users_random_state_and_threads_stay(config: RunConfig) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    config.protocol.threads = threads + 1
    config.protocol.epochs = 1
    seen = []
    train(config, progress=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {threads + 1}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), expected)


def test_a_diverged_run_keeps_no_checkpoint_without_weights(config: RunConfig) -> None:
    config.record.weights = "none"
    config.optimizer = OptimizerConfig("sgd", lr=1e9)
    assert train(config).status == "diverged"
    assert not (Path(str(config.output)) / "checkpoint.pt").exists()


def test_one_seed_gives_one_start_and_one_order_whatever_the_rule(config: RunConfig) -> None:
    losses = []
    for number, (mode, seed) in enumerate([(None, 0), ("symmetric", 0), ("symmetric", 1)]):
        run = replace(
            config,
            feedback=FeedbackConfig(mode),
            output=f"{config.output}-{number}",
            protocol=replace(config.protocol, seed=seed, epochs=1),
        )
        train(run)
        losses.append(series(read(str(run.output)), "train_loss"))
    # symmetric feedback is backprop, by other kernels: in float32, and some steps of training later
    assert losses[0] == pytest.approx(losses[1], rel=HALF_OF_FLOAT32)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


def test_the_patch_is_gone_when_the_run_is_over(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = state.models.build
    monkeypatch.setattr(state.models, "build", lambda *args: built.append(build(*args)) or built[-1])
    patched = []
    config.protocol.epochs = 1
    train(config, progress=lambda _: patched.append(get_patch(built[0]) is not None))
    with pytest.raises(ZeroDivisionError):
        train(replace(config, output=f"{config.output}-2"), progress=at(1, 1, ZeroDivisionError))
    assert all(patched)
    assert [get_patch(model) for model in built] == [None, None]


def test_layers_can_be_left_exact(config: RunConfig) -> None:
    config.protocol.epochs = 1
    config.feedback.exclude = ["fc2"]
    train(config)
    assert set(read(str(config.output))["layer"].dropna()) == {"conv1", "conv2", "fc1"}


def test_digits_are_learned_with_sign_concordant_feedback(tmp_path: Path) -> None:
    config = RunConfig(protocol=ProtocolConfig(epochs=3), output=str(tmp_path / "digits"))
    assert config.feedback.mode == "sign"
    result = train(config)
    assert result.last_error is not None
    assert result.last_error < 25


def test_mini_batches_change_their_size_after_an_epoch(config: RunConfig) -> None:
    config.protocol = ProtocolConfig(epochs=4, batch_size=10, batch_sizes={1: 20, 3: 40}, threads=1)
    result = train(config)
    errors = read(result.folder)
    ends = errors[errors["metric"] == "train_error"].set_index("epoch")["step"]
    assert ends.to_dict() == {1: 4, 2: 6, 3: 8, 4: 9}


def test_what_is_held_out_is_not_trained_on_and_its_error_recorded(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.data.val_fraction = 0.4
    seen: list[Split] = []
    evaluate = evaluation.loss_and_error

    def spy(run: state.TrainingState, split: Split, recorder: Recorder) -> tuple[float, float]:
        seen.append(split)
        return evaluate(run, split, recorder)

    monkeypatch.setattr(evaluation, "loss_and_error", spy)
    result = train(config)
    table = read(result.folder)
    assert result.step == 4 * 2  # 24 images left of 40, 12 a mini-batch
    assert len(series(table, "val_error")) == len(series(table, "val_loss")) == 5
    held_out, test = seen[0], seen[1]
    assert (len(held_out.labels), len(test.labels)) == (16, 10)
    assert result.last_error == series(table, "test_error")[-1]
    data = load(replace(config.data, size=28))
    network = build(resolve(config).model, 2, 3, (28, 28))
    network.load_state_dict(load_file(result.folder / "last.safetensors"))
    with torch.no_grad():
        x, y = data.batch(held_out, slice(None), torch.device("cpu"))
        wrong = (network.eval()(x).argmax(1) != y).double().mean().item()
    assert series(table, "val_error")[-1] == pytest.approx(100 * wrong)


@pytest.mark.parametrize("options", [{"std": 0.0}], ids=str)
def test_a_run_without_any_angle_has_no_figure_of_it(options, tmp_path):
    config = RunConfig(output=str(tmp_path / "run"))
    config.feedback.mode, config.feedback.options, config.protocol.epochs = "random", options, 1
    result = train(config)
    assert result.status == "finished"
    drawn = {path.stem for path in result.figures}
    assert "error" in drawn
    assert not drawn & {"weight_angle", "error_angle", "weight_angle_map", "error_angle_map"}


def test_a_run_that_diverges_before_its_first_epoch_ends_with_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "loss_and_error", lambda *_: (float("nan"), float("nan")))
    result = train(RunConfig(output=str(tmp_path / "run")))
    assert result.status == "diverged"
    assert result.reason == "test loss is nan in epoch 0, after 0 steps"
    assert len(read(tmp_path / "run")) > 0


def test_the_concordance_changes_after_the_epochs_of_the_schedule_and_on_resume(config: RunConfig) -> None:
    config.feedback = FeedbackConfig("sign", schedule={1: {"concordance": 0.75}, 3: {"concordance": 0.5}})
    config.record.every = 3  # the first step of each epoch
    config.record.figures = False
    whole = train(config)
    interrupted = replace(config, output=f"{config.output}-interrupted")
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, progress=at(3, 1, KeyboardInterrupt))
    again = train(interrupted, resume=True)
    tables = [read(result.folder) for result in (whole, again)]
    agreement = tables[0][(tables[0].metric == "sign_agreement") & (tables[0].layer == "fc1")]
    by_step = agreement.groupby("step")["value"].first()
    for step, expected in ((0, 1.0), (3, 0.75), (6, 0.75), (9, 0.5)):
        assert by_step[step] == pytest.approx(expected, abs=of_share(expected, 400_000))
    columns = ["step", "epoch", "layer", "metric", "value"]
    first, second = (t[columns].sort_values(columns).reset_index(drop=True) for t in tables)
    pandas.testing.assert_frame_equal(first, second)


def test_each_layer_may_have_a_rule_of_its_own(config: RunConfig) -> None:
    config.feedback.mode = {"conv.*": {"mode": "sign", "concordance": 0.75}, "fc1": "random"}
    config.protocol.epochs = 1
    config.record.figures = False
    table = read(train(config).folder)
    last = table[(table.metric == "sign_agreement") & (table.step == table.step.max())]
    by_layer = dict(last[["layer", "value"]].to_numpy())
    assert by_layer["conv2"] == pytest.approx(0.75, abs=of_share(0.75, 25_000))
    assert by_layer["fc1"] == pytest.approx(0.5, abs=of_share(0.5, 400_000))
    assert "fc2" not in by_layer
    assert resolve(replace(config, output=None)).output.endswith("-mixed-seed0")  # type: ignore[union-attr]


def test_the_rate_follows_half_a_cosine(config: RunConfig) -> None:
    config.protocol.lr_schedule = "cosine"
    config.feedback.mode = None
    config.record.figures = False
    rates = series(read(train(config).folder), "learning_rate")
    assert rates == pytest.approx([2e-4 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)])


def test_figures_are_drawn_by_whoever_asks_for_them_and_only_if_they_are_to_be_recorded(
    config: RunConfig,
) -> None:
    config.protocol.epochs = 1
    drawn: list[Path] = []
    assert train(config, draw=None).figures == []
    recorded = train(replace(config, output=f"{config.output}-recorded"), draw=drawn.append)
    assert drawn == [recorded.folder]
    without = replace(config, record=RecordConfig(figures=False), output=f"{config.output}-without")
    train(without, draw=drawn.append)
    assert drawn == [recorded.folder]
