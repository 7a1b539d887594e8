"""The training command on a GPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import bounds
from support.gpu import DEVICE
from torch import Tensor, nn

from feedbackhook import read
from feedbackhook.experiments.config import (
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.models.batch_norm import estimate_statistics
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.training.progress import Progress
from feedbackhook.experiments.training.run import train


@pytest.mark.parametrize("how", [True, "reduce-overhead"])
@pytest.mark.parametrize("parts", [1, 2])
def test_compiled_training_is_the_eager_one_up_to_rounding(tmp_path, how, parts):
    """At ten times this learning rate, training explodes and tells the roundings of two kernels apart."""
    tables = []
    for compile in (how, False):
        config = RunConfig(
            data=DataConfig("digits", train_images=200, test_images=100),
            model=ModelConfig("liao2016/mnist"),
            feedback=FeedbackConfig("brSF", {"concordance": 0.8}),
            optimizer=OptimizerConfig("sgd", lr=1e-4),
            protocol=ProtocolConfig(
                epochs=2, batch_size=50, device=DEVICE, compile=compile, gradient_accumulation_steps=parts
            ),
            record=RecordConfig(every=3, figures=False),
            output=str(tmp_path / f"compile-{compile}"),
        )
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            assert train(config).status == "finished"
        table = read(config.output)
        tables.append(table[table["metric"] == "weight_norm"].set_index(["step", "layer"])["value"])
    assert tables[0].to_numpy() == pytest.approx(tables[1].to_numpy(), rel=bounds.HALF_OF_FLOAT32)


def test_training_runs_on_the_device_and_resumes_after_an_interruption(tmp_path):
    """Only on a CPU are resumed runs promised to be bit-equal. On a GPU, kernels may add in a different order
    each time, so metrics agree to half of float32's digits, and errors to one image."""

    def config(name: str) -> RunConfig:
        return RunConfig(
            data=DataConfig("digits", train_images=200, test_images=100),
            model=ModelConfig("liao2016/mnist"),
            feedback=FeedbackConfig("brSF", {"concordance": 0.8}),
            optimizer=OptimizerConfig("sgd", lr=1e-3),
            protocol=ProtocolConfig(epochs=3, batch_size=50, threads=1, device=DEVICE),
            record=RecordConfig(every=2, figures=False),
            output=str(tmp_path / name),
        )

    def stop(now: Progress) -> None:
        if now.epoch == 1 and now.batch == 2:
            raise KeyboardInterrupt

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        result = train(config("whole"))
        assert (result.status, result.epoch) == ("finished", 3)
        with pytest.raises(KeyboardInterrupt):
            train(config("resumed"), progress=stop)
        assert train(config("resumed"), resume=True).status == "finished"
    keys = ["step", "epoch", "layer", "depth", "metric"]
    whole, resumed = (
        read(tmp_path / name).set_index(keys)["value"].sort_index() for name in ("whole", "resumed")
    )
    assert resumed.index.equals(whole.index)
    if DEVICE == "cpu":
        assert resumed.equals(whole)
    # shown by pytest -rP
    print("bit-equal" if resumed.equals(whole) else f"largest difference: {(resumed - whole).abs().max()}")
    for key, ours, theirs in zip(whole.index, resumed, whole, strict=True):
        if key[-1].endswith("_error"):
            assert ours == pytest.approx(theirs, abs=0.011), key
        elif "angle" in key[-1]:
            assert ours == pytest.approx(theirs, abs=math.degrees(bounds.HALF_OF_FLOAT32), nan_ok=True), key
        else:
            assert ours == pytest.approx(theirs, rel=bounds.HALF_OF_FLOAT32, nan_ok=True), key


@pytest.mark.parametrize("batch_norm", ["paper", "affine"])
def test_a_network_with_averaged_batch_norm_evaluates_on_the_device(batch_norm):
    """cuDNN's batch normalization refuses an eps of 0."""
    plain = build(ModelConfig("liao2016/mnist", batch_norm=batch_norm), classes=10, channels=1, size=(28, 28))
    model, x = copy.deepcopy(plain).to(DEVICE), torch.randn(20, 1, 28, 28)
    want, got = (
        _evaluated(network, x.to(device)).cpu() for network, device in ((plain, "cpu"), (model, DEVICE))
    )
    torch.testing.assert_close(got, want, rtol=bounds.HALF_OF_FLOAT32, atol=bounds.HALF_OF_FLOAT32)


@torch.no_grad()
def _evaluated(network: nn.Module, x: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        estimate_statistics(network, [x])
        return network.eval()(x)
