"""The grammar of conditions, and what each makes of a configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from feedbackhook.cli import main
from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import (
    ConfigError,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RunConfig,
)
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training.run import train
from feedbackhook.store.recorder import read

PAPER = [
    *("SGD", "BM", "BN", "BN+BM", "uSF", "NuSF", "uSF+BM", "uSF+BN", "uSF+BN+BM"),
    *("brSF+BN+BM", "frSF+BN+BM", "RndF", "RndF+BN", "RndF+BM", "RndF+BN+BM"),
    *(f"brSF+BN+BM concordance={c}" for c in ("0", "0.25", "0.5", "0.75", "1")),
    *(f"frSF+BN+BM concordance={c}" for c in ("0", "0.25", "0.5", "0.75", "1")),
    *(f"{name} Bottom" for name in ("SGD", "RndF", "RndF+BN+BM", "uSF+BN+BM")),
    *(f"{name} Top" for name in ("SGD", "RndF", "RndF+BN+BM", "uSF+BN+BM")),
    *(f"{prefix}BM{setting}" for prefix in ("", "uSF+BN+") for setting in (1, 2, 3)),
]
"""All conditions of Liao et al. 2016, Tables 2 to 5; "uSF+BN" and "SGD" stand in two of them."""


def test_the_paper_has_39_names():
    assert len(PAPER) == len(set(PAPER)) == 39


OTHERS = [
    *("NuSF+BN+BM2 Top", "frSF concordance=0.3 Bottom", "brSF+BM0"),
    *("FA", "uSF-SN+BN", "uSF-init+BM", "sign-symmetry+BN+BM Top", "toeplitz", "FA init=kaiming_normal"),
    *("angle degrees=22.5", "angle+BN degrees=45 redraw=update Bottom", "noise level=0.5 scale=None"),
    *("sparse share=0.01", "quantized bits=1", "low_rank rank=4 std=0.1", "svd power=-0.5 rank=8"),
]


@pytest.mark.parametrize("name", [*PAPER, *OTHERS])
def test_a_name_is_parsed_and_written_again(name):
    assert Condition.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "decided"),
    [
        ("SGD", (None, {}, "none", None, "sgd", 1)),
        ("BM", (None, {}, "none", None, "batch_manhattan", 1)),
        ("BN", (None, {}, "affine", None, "sgd", 1)),
        ("BN+BM", (None, {}, "affine", None, "batch_manhattan", 1)),
        ("NuSF", ("NuSF", {}, "none", None, "sgd", 1)),
        ("uSF+BN", ("uSF", {}, "paper", None, "sgd", 1)),
        ("brSF+BN+BM concordance=0.25", ("brSF", {"concordance": 0.25}, "paper", None, "batch_manhattan", 1)),
        ("uSF+BN+BM3", ("uSF", {}, "paper", None, "batch_manhattan", 3)),
        ("angle+BN degrees=45", ("angle", {"degrees": 45.0}, "paper", None, "sgd", 1)),
        ("uSF-SN+BM", ("uSF-SN", {}, "none", None, "batch_manhattan", 1)),
        ("svd power=-1 rank=8", ("svd", {"power": -1.0, "rank": 8}, "none", None, "sgd", 1)),
        ("noise scale=None", ("noise", {"scale": None}, "none", None, "sgd", 1)),
        ("RndF Top", ("RndF", {}, "none", "Top", "sgd", 1)),
        ("SGD Bottom", (None, {}, "none", "Bottom", "sgd", 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_condition_decides(name, decided):
    config = resolve(RunConfig(condition=name))
    f, m, o = config.feedback, config.model, config.optimizer
    assert config.protocol.reduction == "sum"
    assert (f.mode, f.options, m.batch_norm, m.frozen, o.name, o.setting) == decided
    assert resolve(config) == config  # as a run's config.yaml is a configuration, too


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uSf", "'uSf' is not a term of a condition; did you mean 'uSF', 'NuSF' or 'uSF-SN'\\?"),
        ("brsf+BN+BM", "'brsf' is not a term of a condition; did you mean 'brSF' or 'frSF'\\?"),
        ("uSF+qqq", "'qqq' is not a term of a condition\\. The terms are SGD"),
        ("brSF concordnace=0.5", "Top or Bottom; did you mean 'concordance='\\?"),
        ("BM4", "'BM4' is not a term of a condition; did you mean 'BM"),
        ("uSF+RndF", "says twice what feedback is"),
        ("SGD+BN", "SGD stands alone"),
        ("uSF concordance=0.5", "only brSF and frSF take the option concordance: remove it"),
        ("brSF concordance=1.5", "concordance must be from 0 to 1, not 1.5"),
        ("brSF concordance=x", "concordance must be a number, not 'x'"),
        ("brSF concordance=nan", "concordance must be from 0 to 1, not nan"),
        ("brSF concordance=0.5 concordance=0.7", "says twice what concordance is"),
        ("SGD Top Bottom", "says twice what frozen is"),
        ("SGD Middle", "'Middle' is not Top or Bottom"),
        ("brSF Middle", "'Middle' is not concordance=VALUE, Top or Bottom"),
        ("SGD degrees=45", "only angle takes the option degrees: remove it"),
        ("uSF-SM", "'uSF-SM' is not a term of a condition; did you mean 'uSF-SN'"),
        ("angle degree=45", "'degree=45' is not degrees=VALUE, .* did you mean 'degrees='"),
        ("angle degrees", "'degrees' is not degrees=VALUE, .* did you mean 'degrees='"),
        ("angle degrees=200", "degrees must be from 0 to 180, not 200"),
        ("low_rank rank=2.5", "rank must be a whole number, not 2.5"),
        ("FA init=xavier", "init must be one of 'layer', 'kaiming_uniform'"),
        ("", "''"),
    ],
)
def test_what_is_no_condition_says_why(name, message):
    with pytest.raises(ConfigError, match=message):
        Condition.parse(name)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("SGD", "conditions must be a list of names, such as [SGD, BN+BM], or a mapping, such as {half: "),
        ({"half": 5}, "'half' must map settings of a run to values, such as {feedback: {mode: sign"),
        ({"half": None}, "'half' must map settings of a run to values, such as {feedback: {mode: sign"),
        ({"half": "uSF+BN"}, "such as {condition: uSF+BN}, or {feedback: "),
        ([{"half": {}}, "SGD"], "write all of them as a mapping (without the dashes), such as {half: "),
        ({0.5: {}}, "the name of a condition must be text, not 0.5: put it in quotes"),
        (
            {"half": {"feedbac": {}}},
            "sets feedbac, which is not a setting of a run; did you mean 'feedback'?",
        ),
        (
            {"half": {"feedback": {"optons": {}}}},
            "feedback.optons, which is not a setting of a run; did you mean 'opt",
        ),
        (
            {"half": {"feedback": "sign"}},
            "map settings of feedback to values, such as {feedback: {mode: VALUE}}",
        ),
        ({"half": {"feedback": {"options": 5}}}, "feedback.options must be a mapping ({NAME: VALUE}), not 5"),
        ({"half": {"protocol": {"epochs": "many"}}}, "protocol.epochs must be a whole number, not many"),
    ],
    ids=str,
)
def test_conditions_that_are_none_say_what_to_write(conditions, message, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"conditions": conditions, "datasets": ["digits"]}))
    assert main(["sweep", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not any(word in error for word in ("Union", "<class", "typing", "Parser key"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feedback": FeedbackConfig("RndF")}, "feedback.mode"),
        ({"model": ModelConfig(batch_norm="affine")}, "model.batch_norm"),
        ({"optimizer": OptimizerConfig(setting=2)}, "optimizer.setting"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_condition_does_not_overrule_what_is_given(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve(replace(RunConfig(condition="uSF+BN+BM"), **given))


@pytest.mark.parametrize("name", PAPER)
def test_every_condition_trains_an_epoch_on_digits(name, tmp_path):
    result = train(
        RunConfig(
            condition=name,
            protocol=ProtocolConfig(epochs=1, threads=1),
            optimizer=OptimizerConfig(lr=5e-5),
            output=str(tmp_path / "run"),
        )
    )
    assert result.status == "finished"
    norms = read(tmp_path / "run").query("metric == 'test_error'")["value"]
    assert len(norms) == 2


@pytest.mark.parametrize(("part", "trained"), [("Bottom", ["conv1", "conv2", "fc1"]), ("Top", ["fc2"])])
def test_the_frozen_part_stays_as_it_was_drawn(part, trained, tmp_path):
    from safetensors.torch import load_file

    weights = []
    for epochs in (1, 2):
        config = RunConfig(condition=f"RndF+BN+BM {part}", protocol=ProtocolConfig(epochs=epochs, threads=1))
        train(replace(config, output=str(tmp_path / str(epochs))))
        weights.append(load_file(tmp_path / str(epochs) / "last.safetensors"))
    moved = {
        key.partition(".")[0]
        for key in weights[0]
        if "bn" not in key and not torch.equal(*(w[key] for w in weights))
    }
    assert sorted(moved) == trained
