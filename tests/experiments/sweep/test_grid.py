"""Which runs a sweep plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import left, names, tiny, written

from feedbackhook.cli import main
from feedbackhook.experiments.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SweepModelConfig,
    SweepProtocolConfig,
)
from feedbackhook.experiments.sweep.grid import plan, stored
from feedbackhook.experiments.sweep.run import sweep
from feedbackhook.liao2016.published import error_rates
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.store import manifest


def test_a_plan_is_the_product_and_its_names_tell_the_place_in_it(tmp_path: Path) -> None:
    protocol = SweepProtocolConfig(lr_factors=3, seeds=2, seed=4)
    runs = plan(tiny(tmp_path, protocol=protocol))
    assert len(runs) == 3 * 3 * 2
    assert names(runs)[:3] == [
        "digits-SGD-rate10-seed4",
        "digits-SGD-rate10-seed5",
        "digits-SGD-rate1-seed4",
    ]
    assert names(runs)[-1] == "digits-brSF-concordance=0.5-rate0.1-seed5"
    assert names(runs) == names(plan(tiny(tmp_path / "elsewhere", protocol=protocol)))
    last = runs[-1].config
    assert (last.optimizer.lr, last.protocol.seed) == (pytest.approx(5e-5), 5)
    assert last.data == DataConfig("digits", size=16, val_fraction=0.1)
    assert last.output == str(tmp_path / "digits-brSF-concordance=0.5-rate0.1-seed5")


@pytest.mark.parametrize(
    ("rates", "factors"),
    [(5, (100, 10, 1, 0.1, 0.01)), (3, (10, 1, 0.1)), (1, (1,)), ([2.0, 0.5], (2, 0.5))],
    ids=str,
)
def test_rates_are_the_papers_or_ones_own(tmp_path: Path, rates: Any, factors: tuple[float, ...]) -> None:
    runs = plan(tiny(tmp_path, conditions=["SGD"], protocol=SweepProtocolConfig(lr_factors=rates)))
    assert tuple(run.lr_factor for run in runs) == factors
    assert [run.config.optimizer.lr for run in runs] == pytest.approx([5e-4 * f for f in factors])


def test_the_network_is_the_papers_for_the_dataset(tmp_path: Path) -> None:
    config = tiny(
        tmp_path, datasets=["digits", "MNIST", "CIFAR100", "SVHN", "STL10"], model=SweepModelConfig()
    )
    networks = {run.dataset: run.config.model.name for run in plan(config)}
    assert networks == {
        "digits": "liao2016/mnist",
        "MNIST": "liao2016/mnist",
        "CIFAR100": "liao2016/cifar",
        "SVHN": "liao2016/svhn",
        "STL10": "liao2016/images",
    }
    given = plan(replace(config, model=SweepModelConfig("timm/resnet18", options={"drop_rate": 0.1})))
    assert given[0].config.model == ModelConfig("timm/resnet18", options={"drop_rate": 0.1})


OWN: dict[str, dict[str, Any]] = {
    "backprop": {"feedback": {"mode": None}, "optimizer": {"name": "sgd", "lr": 0.02}},
    "half of the signs": {"feedback": {"mode": "sign", "options": {"concordance": 0.5}}},
    "the paper's": {"condition": "uSF+BM2"},
    "other network": {"model": {"name": "liao2016/mnist"}, "data": {"size": 28}, "protocol": {"epochs": 1}},
}


def test_conditions_of_ones_own_set_what_they_name_and_leave_the_rest(tmp_path: Path) -> None:
    given = tiny(tmp_path, conditions=OWN)
    runs = {run.condition: run for run in plan(given) if run.lr_factor == 0.1}
    assert list(runs) == list(OWN)
    assert runs["half of the signs"].name == "digits-half-of-the-signs-rate0.1-seed0"
    backprop, half, papers, other = (runs[name].config for name in OWN)
    assert (backprop.label, backprop.condition, backprop.feedback.mode) == ("backprop", None, None)
    assert (backprop.optimizer.name, backprop.optimizer.lr) == ("sgd", pytest.approx(0.002))
    assert half.optimizer == replace(given.optimizer, lr=pytest.approx(5e-5))
    assert (half.feedback.mode, half.feedback.options) == ("sign", {"concordance": 0.5})
    assert (papers.condition, papers.label) == ("uSF+BM2", "the paper's")
    assert (other.model.name, other.data.size, other.protocol.epochs) == ("liao2016/mnist", 28, 1)
    assert half.data == replace(given.data, name="digits")
    path = written(given, tmp_path / "sweep.yaml")
    assert stored(path.parent).conditions == OWN


def test_a_sweep_of_ones_own_conditions_has_its_table_and_report(tmp_path: Path) -> None:
    own = {name: OWN[name] for name in ("backprop", "half of the signs")}
    protocol = SweepProtocolConfig(epochs=1, lr_factors=1)
    results = sweep(tiny(tmp_path, conditions=own, protocol=protocol))
    assert {result.status for result in results.values()} == {"finished"}
    table = sweep_table(tmp_path)
    assert list(table.cells["condition"]) == list(own)
    assert table.reference == "backprop"
    assert table.cells["class_of_best"].notna().all()
    assert table.missing == {}
    for command in (["table"], ["report"], ["compare"]):
        assert main([*command, str(tmp_path)]) == 0
    assert "more worse than backprop" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedback": {"mood": "sign"}}, "condition 'own'.*mood"),
        ({"optimizer": {"lr": "fast"}}, "condition 'own'.*lr"),
        ({"data": {"name": "MNIST"}}, "sets data.name, which only the sweep may set"),
        ({"protocol": {"seed": 3}}, "sets protocol.seed, which only the sweep may set"),
        ({"condition": "uSF", "feedback": {"mode": "random"}}, "sets feedback.mode to 'uSF'"),
        (
            {"feedback": {"schedule": {9: {"concordance": 0.5}}}},
            "condition 'own': feedback.schedule: epoch 9 never comes, since protocol.epochs is",
        ),
        ("sign", "must map settings of a run to values"),
    ],
)
def test_a_condition_of_ones_own_that_cannot_be_is_named(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny(tmp_path, conditions={"own": settings}))


def test_usf_with_batch_manhattan_alone_has_two_procedures(tmp_path: Path) -> None:
    conditions = ["uSF+BM", "uSF+BN+BM", "uSF+BM2", "uSF+BM Top", "brSF+BM"]
    protocol = SweepProtocolConfig(epochs=8, lr_factors=1)
    runs = plan(tiny(tmp_path, conditions=conditions, protocol=protocol))
    assert names(runs)[:2] == ["digits-uSF+BM-rate1-seed0", "digits-uSF+BM-rate1-seed0-batch500"]
    assert [run.config.protocol.batch_sizes for run in runs] == [{}, {3: 500}, {}, {}, {}, {}]
    short = tiny(tmp_path, conditions=["uSF+BM"], protocol=SweepProtocolConfig(epochs=3, lr_factors=1))
    assert len(plan(short)) == 1  # there is nothing after the third epoch


def test_small_is_one_dataset_and_a_short_protocol_in_a_folder_of_its_own(tmp_path: Path) -> None:
    config = tiny(
        tmp_path / "full", datasets=["MNIST", "SVHN"], protocol=SweepProtocolConfig(), small="digits"
    )
    runs = plan(config)
    assert {run.dataset for run in runs} == {"digits"}
    assert [run.lr_factor for run in runs] == [10, 1, 0.1] * 3
    assert {run.config.protocol.epochs for run in runs} == {8}
    assert Path(str(runs[0].config.output)).parent == tmp_path / "full-digits"
    own = replace(config, protocol=SweepProtocolConfig(epochs=3, lr_factors=1))
    assert [(run.config.protocol.epochs, run.lr_factor) for run in plan(own)] == [(3, 1.0)] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conditions": []}, "one of them is empty"),
        ({"conditions": ["uSF+BX"]}, "'BX' is not a term of a condition"),
        ({"conditions": ["uSF+BN", "uSF+BN"]}, "2 runs of the sweep have the name digits-uSF"),
        (
            {"datasets": ["Omniglot"], "model": SweepModelConfig()},
            "no network is registered for Omniglot:",
        ),
        ({"data": DataConfig("MNIST")}, "data.name has no effect in a sweep"),
        ({"optimizer": OptimizerConfig("batch_manhattan", setting=3)}, "sets optimizer.setting to 1"),
        ({"protocol": SweepProtocolConfig(lr_factors=2)}, "protocol.lr_factors must be 1, 3 or 5"),
        ({"protocol": SweepProtocolConfig(lr_factors=[0.0])}, "more than 0, not 0.0"),
        ({"protocol": SweepProtocolConfig(lr_factors=[float("inf")])}, "more than 0, not inf"),
        ({"protocol": SweepProtocolConfig(seeds=0)}, "protocol.seeds must be 1 or more"),
        ({"workers": 0}, "workers must be 1 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_planned_is_one_clear_error(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny(tmp_path, **given))


@pytest.mark.parametrize("content", ["conditions: 3", "nothing: [", "conditions: [SGD]"])
def test_a_damaged_sweep_yaml_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"sweep\.yaml is damaged"):
        stored(tmp_path)


def test_the_manifest_says_what_was_planned_and_what_is_published(tmp_path: Path) -> None:
    conditions = ["SGD", "uSF+BM", "brSF+BN+BM concordance=0.5", "frSF+BN+BM"]
    config = tiny(tmp_path, conditions=conditions, datasets=["digits", "MNIST"], model=SweepModelConfig())
    config = replace(config, protocol=SweepProtocolConfig(epochs=8, lr_factors=[2.0], seeds=2))
    runs = left(config)
    found = manifest.read(tmp_path)
    assert [run.name for run in found.runs] == names(runs)
    assert [run.procedure for run in found.runs[2:6]] == [None, None, "batch500", "batch500"]
    assert found.runs[4].batch_sizes == {3: 500}
    assert {run.lr / run.lr_factor for run in found.runs} == {config.optimizer.lr}
    given = {name: (one.rule, one.series, one.concordance) for name, one in found.conditions.items()}
    assert given == {
        "SGD": (None, "SGD", None),
        "uSF+BM": ("uSF", "uSF+BM", None),
        "brSF+BN+BM concordance=0.5": ("brSF", "brSF+BN+BM", 0.5),
        "frSF+BN+BM": ("frSF", "frSF+BN+BM", 1.0),
    }
    assert found.published is not None
    assert set(found.published.errors) == {"MNIST"}
    assert found.published.errors["MNIST"]["SGD"] == error_rates().loc["SGD", "MNIST"]
    assert {point.series for point in found.published.curves} == {"brSF+BN+BM", "frSF+BN+BM"}


def test_the_manifest_of_own_conditions_has_the_first_as_reference(tmp_path: Path) -> None:
    left(tiny(tmp_path, conditions=OWN))
    found = manifest.read(tmp_path)
    assert found.reference == "backprop"
    assert found.published is None
    assert [(one.rule, one.series) for one in found.conditions.values()] == [
        (None, None),
        ("sign", None),
        ("uSF", None),
        ("sign", None),
    ]
