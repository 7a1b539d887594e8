"""What a configuration resolves to, and what is refused before a folder is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import train

from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.models.registry import NETWORKS
from feedbackhook.experiments.resolve import resolve


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("feedback", partial(FeedbackConfig, "frsf")), "frsf"),
        (("feedback", partial(FeedbackConfig, "frSF", {"concordance": 1.3})), "concordance"),
        (("feedback", partial(FeedbackConfig, "frSF", {"concord": 1})), "concord"),
        (("feedback", partial(FeedbackConfig, "sign", include="head")), "head"),
        (
            ("feedback", partial(FeedbackConfig, "tensor", {"feedback": torch.ones(1)})),
            "cannot be written to config.yaml",
        ),
        (("optimizer", partial(OptimizerConfig, lr=-1.0)), "lr"),
        (("optimizer", partial(OptimizerConfig, "sgd", lr=-1.0)), "learning rate"),
        (("optimizer", partial(OptimizerConfig, setting=7)), "setting"),
        (("protocol", partial(ProtocolConfig, epochs=0)), "protocol.epochs must be 1 or more, not 0"),
        (
            ("protocol", partial(ProtocolConfig, batch_size=41)),
            "a mini-batch of 41 is more than the 40",
        ),
        (
            ("protocol", partial(ProtocolConfig, 5, 9, {2: 41})),
            "a mini-batch of 41 is more than the 40",
        ),
        (
            ("protocol", partial(ProtocolConfig, batch_sizes={0: 5})),
            "an epoch in protocol.batch_sizes must be 1 or more",
        ),
        (
            ("protocol", partial(ProtocolConfig, batch_sizes={1: 0})),
            "a size in protocol.batch_sizes must be 1 or more",
        ),
        (("protocol", partial(ProtocolConfig, lr_factor=0.0)), "lr_factor must be positive"),
        (("protocol", partial(ProtocolConfig, milestones=[0])), "milestones must be 1 or more"),
        (("protocol", partial(ProtocolConfig, device="abacus")), "device 'abacus' is not a torch device"),
        (("record", partial(RecordConfig, every=0)), "record.every"),
        (("record", partial(RecordConfig, gradient_angle_every=-1)), "record.gradient_angle_every"),
        (("model", partial(ModelConfig, "timm/nothing")), "no model named 'nothing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_leaves_no_folder(
    config: RunConfig, change: tuple[str, Callable[[], Any]], message: str
) -> None:
    section, make = change
    with pytest.raises(ConfigError, match=message):
        train(replace(config, **{section: make()}))
    assert not Path(str(config.output)).exists()


def test_the_papers_schedule_is_scaled_to_the_epochs() -> None:
    milestones = {n: resolve(RunConfig(protocol=ProtocolConfig(n))).protocol.milestones for n in (65, 15)}
    assert milestones == {65: [50, 60], 15: [12, 14]}


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("optimizer", {"name": "sgd", "setting": 3}, "optimizer.setting has no effect with sgd"),
        ("protocol", {"seed": 2**63}, r"protocol.seed must be less than 2\*\*63"),
    ],
    ids=str,
)
def test_a_setting_without_effect_and_a_seed_out_of_range_are_refused(section, options, message, tmp_path):
    config = RunConfig(output=str(tmp_path / "run"))
    for name, value in options.items():
        setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("optimizer", partial(OptimizerConfig, "adamw")),
            "'adamw' is not sgd, .*; did you mean 'timm/adamw'",
        ),
        (
            ("optimizer", partial(OptimizerConfig, "timm/adamw", setting=2)),
            "setting has no effect with timm/adamw",
        ),
        (
            ("optimizer", partial(OptimizerConfig, "sgd", options={"eps": 1.0})),
            "options have no effect with sgd",
        ),
        (("optimizer", partial(OptimizerConfig, "timm/adamw", options={"wings": 1})), "wings"),
        (
            ("protocol", partial(ProtocolConfig, lr_schedule="cosine", milestones=[1])),
            "milestones have no effect",
        ),
        (("feedback", partial(FeedbackConfig, None, schedule={1: {}})), "no effect without feedback.mode"),
        (
            ("feedback", partial(FeedbackConfig, "sign", schedule={0: {}})),
            "an epoch in feedback.schedule must be 1",
        ),
        (
            ("feedback", partial(FeedbackConfig, "sign", schedule={1: {}, 30: {"concordance": 0.5}})),
            r"feedback.schedule: epoch 30 never comes, since protocol.epochs is \d+: change one of them",
        ),
        (
            ("protocol", partial(ProtocolConfig, 3, milestones=[3, 4])),
            "protocol.milestones: epoch 4 never comes, since protocol.epochs is 3",
        ),
        (("feedback", partial(FeedbackConfig, "sign", schedule={1: {"std": 1}})), "std"),
        (("feedback", partial(FeedbackConfig, {"conv9": "sign"})), "conv9"),
        (("data", partial(DataConfig, train_images=0)), "data.train_images must be 1 or more"),
        (
            ("record", partial(RecordConfig, weights="some")),
            "record.weights must be all or best or none, not 'some'",
        ),  # type: ignore[arg-type]
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_options_without_effect_or_sense_are_refused(
    config: RunConfig, given: tuple[str, Callable[[], Any]], message: str
) -> None:
    section, make = given
    with pytest.raises(ConfigError, match=message):
        train(replace(config, **{section: make()}))
    assert not Path(str(config.output)).exists()


def test_a_resolved_configuration_with_a_cosine_resolves_to_itself(config: RunConfig) -> None:
    config.protocol.lr_schedule = "cosine"
    assert resolve(resolve(config)) == resolve(config)


@pytest.mark.parametrize("name", [*DATASETS, "digits"])
def test_the_network_is_the_papers_for_the_dataset(name: str) -> None:
    network = "liao2016/mnist" if name == "digits" else DATASETS[name].network
    config = resolve(RunConfig(data=DataConfig(name)))
    assert config.model.name == network
    assert config.data.size == (
        None if NETWORKS[network].takes_features else NETWORKS[network].input_size[-1]
    )
    assert resolve(config) == config


def test_a_network_that_is_named_wins_and_other_data_have_that_of_mnist() -> None:
    named = resolve(RunConfig(data=DataConfig("Flowers17"), model=ModelConfig("cifar/resnet20")))
    assert (named.model.name, named.data.size) == ("cifar/resnet20", 32)
    for name in ("FashionMNIST", "imagefolder:birds"):
        other = resolve(RunConfig(data=DataConfig(name)))
        assert (other.model.name, other.data.size) == ("liao2016/mnist", 28)
