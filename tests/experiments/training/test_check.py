"""`record.check_every`: a diagnosis during training, which training does not notice."""

from __future__ import annotations

import math

import pytest

import feedbackhook
from feedbackhook.diagnosis.checks import KINDS
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training.run import train
from feedbackhook.store.run_folder import RunFolder


def config(output, check_every=0, **protocol) -> RunConfig:
    return RunConfig(
        data=DataConfig(train_images=60, test_images=20),
        model=ModelConfig("timm/test_vit", options={"drop_rate": 0.1}),
        feedback=FeedbackConfig("brSF", {"concordance": 0.75}, include=r"blocks\.0\.mlp.*|head"),
        protocol=ProtocolConfig(epochs=1, batch_size=20, threads=1, device="cpu", **protocol),
        record=RecordConfig(every=1, check_every=check_every, figures=False),
        output=str(output),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_does_not_notice_and_the_checks_are_recorded(tmp_path, precision):
    tables = {}
    for every in (0, 2):
        train(config(tmp_path / str(every), every, precision=precision))
        table = feedbackhook.read(tmp_path / str(every))
        checks = table["metric"].str.startswith("check_")
        tables[every] = table[~checks].drop(columns="run").reset_index(drop=True), table[checks]
    assert tables[0][0].equals(tables[2][0])
    assert tables[0][1].empty
    weights = [RunFolder(tmp_path / str(every)).load_checkpoint()["model"] for every in (0, 2)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    rows = tables[2][1]
    assert set(rows["step"]) == {0, 2}  # the first, and the last of three
    for kind in KINDS:
        assert {f"check_{kind}", f"check_{kind}_threshold"} <= set(rows["metric"])
    growth = rows[(rows["metric"] == "check_growth_threshold") & rows["layer"].notna()]["value"]
    unit = 2.0**-7 if precision == "bf16" else 2.0**-23
    assert set(growth) == {1 / unit}
    head = rows[(rows["layer"] == "head") & (rows["metric"] == "check_angle")]["value"]
    assert all(math.isclose(value, 0, abs_tol=1e-3) for value in head)


def test_sharded_gradients_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match="record.check_every needs whole gradients.*use ddp"):
        resolve(config(tmp_path, 5, strategy="fsdp2"))
    with pytest.raises(ConfigError, match="check_every must be 0 or more"):
        config(tmp_path, -1)
