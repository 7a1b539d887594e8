"""What packages register: datasets, networks, terms of conditions, training procedures, published errors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from torch import nn

from feedbackhook.experiments import conditions
from feedbackhook.experiments.conditions import (
    Condition,
    Procedure,
    procedures,
    register_feedback,
    register_procedure,
)
from feedbackhook.experiments.config import ConfigError, ModelConfig, ProtocolConfig
from feedbackhook.experiments.data.registry import (
    DATASETS,
    network_for,
    register_dataset,
    register_network_for,
)
from feedbackhook.experiments.models.build import build, default_size, natural_size
from feedbackhook.experiments.models.registry import NETWORKS, register_network
from feedbackhook.experiments.published import PUBLICATIONS, published_errors

CHECK = """
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.data.registry import DATASETS
from feedbackhook.experiments.models.registry import NETWORKS
assert "MNIST" in DATASETS and {"liao2016/mnist", "cifar/resnet20"} <= set(NETWORKS)
assert Condition.parse("uSF+BM").feedback == "uSF"
"""


@pytest.mark.parametrize(
    "entry",
    [
        "feedbackhook.experiments.training.run",
        "feedbackhook.experiments.sweep.worker",
        "feedbackhook.experiments.data.load",
        "feedbackhook.experiments.models.build",
        "feedbackhook.experiments.config",
        "feedbackhook.liao2016.draws",
    ],
)
def test_the_papers_names_are_known_whatever_is_imported_first(entry: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {entry}\n{CHECK}"], check=True)


@pytest.mark.parametrize(
    "entry", ["feedbackhook.experiments.published", "feedbackhook.experiments.sweep.manifest"]
)
def test_sweeps_know_the_papers_errors_whatever_is_imported_first(entry: str) -> None:
    check = "from feedbackhook.experiments.published import published_errors as errors; rows = errors(); "
    check += "assert rows[(rows.dataset == 'CIFAR10') & (rows.condition == 'BN')].error.tolist() == [16.75]"
    subprocess.run([sys.executable, "-c", f"import {entry}\n{check}"], check=True)


def test_a_dataset_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedbackhook.experiments.data.registry.DATASETS", dict(DATASETS))
    register_dataset(DATASETS["MNIST"])  # the same again
    with pytest.raises(ValueError, match="a dataset named 'MNIST' is already registered"):
        register_dataset(replace(DATASETS["MNIST"], train=1))


def test_data_without_an_entry_may_have_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_for("digits") == "liao2016/mnist"
    assert network_for("FashionMNIST") is None
    monkeypatch.setattr("feedbackhook.experiments.data.registry._NETWORKS", {})
    register_network_for("FashionMNIST", "cifar/vgg16")
    assert network_for("FashionMNIST") == "cifar/vgg16"


def test_a_network_is_built_by_its_name_with_its_options() -> None:
    @register_network("mine/small", (1, 8, 8))
    def small(classes: int, channels: int, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, width, 3), nn.Flatten(), nn.Linear(36 * width, classes))

    try:
        model = build(ModelConfig("mine/small", "affine", options={"width": 2}), 3, 1, (8, 8))
        assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
        assert (model[0].conv.out_channels, model[0].norm.weight is not None) == (2, True)  # type: ignore
        assert (default_size("mine/small"), natural_size(ModelConfig("mine/small"))) == ((1, 8, 8), 8)
        with pytest.raises(ConfigError, match=r"mine/small with model.options .*depth"):
            build(ModelConfig("mine/small", options={"depth": 2}), 3, 1, (8, 8))
        with pytest.raises(ConfigError, match="cannot take images of 9x9"):
            build(ModelConfig("mine/small"), 3, 1, (9, 9))
        with pytest.raises(ValueError, match="'mine/small' is already registered"):
            register_network("mine/small", (1, 8, 8))(small)
    finally:
        del NETWORKS["mine/small"]


def test_a_rule_becomes_a_term_of_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_FEEDBACK", dict(conditions._FEEDBACK))
    register_feedback("sign", "concordance", "magnitude")
    found = Condition.parse("sign+BN magnitude=weight concordance=0.5")
    assert (found.feedback, found.options) == ("sign", (("concordance", 0.5), ("magnitude", "weight")))
    assert found.name == "sign+BN concordance=0.5 magnitude=weight"


def test_a_procedure_trains_its_condition_alone_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    paper, given = Procedure("batch500", {3: 500}), Procedure()
    for name in ("uSF+BM", "uSF+BM1"):  # the same condition
        assert procedures(name, ProtocolConfig(epochs=4)) == [given, paper]
    assert procedures("uSF+BM", ProtocolConfig(epochs=3)) == [given]
    assert procedures("uSF+BM", ProtocolConfig(epochs=4, batch_sizes={1: 50})) == [given]
    for other in ("uSF", "uSF+BN+BM", "uSF+BM2", None):
        assert procedures(other, ProtocolConfig(epochs=65)) == [given]
    assert paper.configure(ProtocolConfig(epochs=4)) == ProtocolConfig(epochs=4, batch_sizes={3: 500})
    monkeypatch.setattr(conditions, "_PROCEDURES", {})
    register_procedure("BM", Procedure("large", {1: 200}))
    register_procedure("BM1", Procedure("large", {1: 200}))
    assert [procedure.name for procedure in procedures("BM", ProtocolConfig(epochs=4))] == ["", "large"]


def test_published_errors_are_found_by_the_names_of_a_configuration() -> None:
    rows = published_errors()
    by_name = rows.set_index(["dataset", "condition"])["error"]
    assert by_name["CIFAR10", "SGD"] == 22.73
    by_series = rows.set_index(["dataset", "series", "concordance"])["error"]
    assert by_name["MNIST", "frSF+BN+BM concordance=0.25"] == by_series["MNIST", "frSF+BN+BM", 0.25]
    assert ("digits", "SGD") not in by_name.index
    assert ("MNIST", "uSF+BX") not in by_name.index
    (publication,) = rows["publication"].unique()
    assert PUBLICATIONS[publication].reference == "SGD"
