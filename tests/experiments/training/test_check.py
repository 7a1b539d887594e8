"""`record.check_every`: a diagnosis during training, which training does not notice."""

from __future__ import annotations

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


def config(output, check_every=0, **protocol) -> RunConfig:
    return RunConfig(
        data=DataConfig(train_images=60, test_images=20),
        model=ModelConfig(batch_norm="affine"),
        feedback=FeedbackConfig("brSF", {"concordance": 0.75}),
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
    rows = tables[2][1]
    assert set(rows["step"]) == {0, 2}  # the first, and the last of three
    for kind in KINDS:
        assert {f"check_{kind}", f"check_{kind}_threshold"} <= set(rows["metric"])
    growth = rows[(rows["metric"] == "check_growth_threshold") & rows["layer"].notna()]["value"]
    unit = 2.0**-7 if precision == "bf16" else 2.0**-23
    assert set(growth) == {1 / unit}
    angles = rows[rows["metric"] == "check_angle"].set_index("depth")["value"]
    assert all(abs(angles[angles.index.max()]) < 1e-3)  # no V above the last layer
    assert all(angles[0] > 10)


def test_sharded_gradients_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"record\.check_every needs whole gradients.*use ddp"):
        resolve(config(tmp_path, 5, strategy="fsdp2"))
    with pytest.raises(ConfigError, match="check_every must be 0 or more"):
        config(tmp_path, -1)
