"""The recipes on text and on tables: their networks beside the oracles, their data, and that they run."""

import copy
import inspect
import math
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from support import bounds, oracle
from support.problems import draw, layer_names, redrawn
from support.recipes import RECIPES, load_recipe

import feedbackhook

RETROFIT = RECIPES / "retrofit"


def run(recipe, **options):
    recipe.main(recipe.Settings(**options))


@pytest.fixture(scope="module")
def characters():
    return load_recipe("retrofit/characters")


@pytest.fixture(scope="module")
def tabular():
    return load_recipe("retrofit/tabular")


def patched(model, rule):
    """A patched copy of the model, and V by layer name."""
    copied = copy.deepcopy(model)
    patch = feedbackhook.patch(copied, **rule)
    return copied, {row.name: patch.feedback(row.name) for row in patch.layers}


# --- beside the oracles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sign 0.75", "random, attention exact"])
def test_the_transformer_learns_as_both_oracles_say(characters, rule):
    model = redrawn(characters.CharacterTransformer(vocabulary=11, blocks=2, width=8, heads=2, context=6))
    codes = torch.randint(11, (3, 6))
    model_with_patch, feedback = patched(model, characters.RULES[rule])
    left_exact = [name for name in layer_names(model) if name not in feedback]
    assert left_exact == [name for name in layer_names(model) if "attention" in name and "exact" in rule]

    def step(network, x):
        return network(codes) + x  # x: of the scores' shape, since characters have no gradient

    x = draw(3, 6, 11)
    oracle.assert_matches_oracle(
        oracle.gradients(model_with_patch, x, step),
        model,
        feedback,
        x,
        step,
        unlike=[name for name, _ in model.named_parameters() if not name.startswith("head.")],
        oracles=oracle.ORACLES,
    )


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("normalization", ["none", "LayerNorm", "BatchNorm"])
def test_the_perceptron_learns_as_both_oracles_say(tabular, depth, normalization):
    model = redrawn(tabular.perceptron(5, 3, 8, depth, normalization))
    for norm in model:
        if hasattr(norm, "num_batches_tracked"):  # its count is no float
            norm.num_batches_tracked = torch.tensor(0)
    model_with_patch, feedback = patched(model, tabular.RULES["sign 0.75"])
    assert list(feedback) == layer_names(model)
    x = draw(16, 5)
    oracle.assert_matches_oracle(
        oracle.gradients(model_with_patch, x),
        model,
        feedback,
        x,
        unlike=["input", *(name for name, _ in model.named_parameters() if name == "hidden1.weight")],
        oracles=oracle.ORACLES,
    )


# --- the data ---------------------------------------------------------------------------------------------


def test_the_split_of_the_text_is_fixed_and_no_paragraph_is_in_two_parts(characters, monkeypatch):
    text = characters.shipped_text()
    training, validation, test = characters.split(text)
    assert training + validation + test == text
    assert len(validation) == len(test) == len(text) // 10

    topics = sys.modules["pydoc_data.topics"].topics
    backwards = SimpleNamespace(topics=dict(reversed(topics.items())))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", backwards)
    assert characters.split(characters.shipped_text()) == (training, validation, test)

    def paragraphs(part):
        return {" ".join(paragraph.split()) for paragraph in part.split("\n\n")}

    assert not paragraphs(test) & paragraphs(training)
    assert max(map(len, paragraphs(test))) > 200


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "this Python has no pydoc_data.topics; .*--text"),
        (SimpleNamespace(topics={"if": "The if statement"}), "pydoc_data.topics has 16 characters .*--text"),
    ],
    ids=["absent", "tiny"],
)
def test_a_python_without_the_text_is_told_so(characters, monkeypatch, tmp_path, module, words):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    with pytest.raises(ModuleNotFoundError, match=words):
        run(characters, smoke=True, output=tmp_path)


def test_a_text_of_ones_own_may_not_be_too_short(characters, tmp_path):
    (tmp_path / "text").write_text("abc" * 100)
    with pytest.raises(ValueError, match="a text of 300 characters is too short: a tenth must hold 65"):
        run(characters, text=tmp_path / "text", output=tmp_path)


def test_bits_by_counts_are_those_of_the_definition(characters):
    training, test = (characters.encode(text, "ab") for text in ("aabab", "abb"))
    single, pairs = characters.count_model_bits(training, test, 2)
    # of the text's 5 characters 3 are a; after the first two a's come an a and two b's, after b an a
    assert single == pytest.approx(-np.log2(3 / 7))
    assert pairs == pytest.approx(-(np.log2(3 / 5) + np.log2(1 / 3)) / 2)


def test_bits_per_character_are_of_every_character_of_the_windows(characters):
    class Half(torch.nn.Module):
        """The next character is 1 with probability 1/4."""

        def forward(self, codes):
            return torch.tensor([0.75, 0.25]).log().expand(*codes.shape, 2)

    codes = torch.tensor([0, 1, 0, 0, 0, 1, 1, 0])  # windows of 3: targets 1 0 0 and 0 1 1; the last is left
    expected = -(3 * np.log2(0.75) + 3 * np.log2(0.25)) / 6
    # In float32 a logarithm, its normalization and a mean of six: fewer than 16 roundings.
    got = characters.bits_per_character(Half(), codes, 3)
    assert got == pytest.approx(expected, rel=16 * bounds.ROUNDING["float32"])


@pytest.mark.parametrize("table", ["wine", "diabetes"])
def test_folds_are_fixed_and_standardized_by_their_training_part(tabular, table):
    first, again = (list(tabular.folds(table, 3)) for _ in range(2))
    for fold, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(fold, same, strict=True))
        x, y, test_x, _ = fold
        x, test_x = x.double(), test_x.double()
        # Computed in float64, then each number is rounded to float32 once: so far are its mean and its std.
        bound = 2 * bounds.ROUNDING["float32"] * x.abs().max()
        assert (x.mean(0).abs() <= bound).all()
        assert ((x.std(0, correction=0) - 1).abs() <= bound).all()
        assert test_x.mean(0).abs().max() > bound
        if table == "diabetes":
            assert y.double().mean().abs() <= 2 * bounds.ROUNDING["float32"] * y.abs().max()
    rows = sum(len(fold[2]) for fold in first)
    assert rows == len(first[0][0]) + len(first[0][2])


# --- the runs ---------------------------------------------------------------------------------------------


def refuse(*args):
    raise AssertionError("a finished condition was trained again")


def test_characters_trains_prints_draws_and_does_not_repeat_what_is_finished(
    characters, tmp_path, monkeypatch, capsys
):
    run(characters, smoke=True, output=tmp_path)
    out = capsys.readouterr().out
    for expected in ("sign 0.75", "head alone", "by counts", "characters.png"):
        assert expected in out
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert list(runs["rule"]) == list(characters.RULES)
    assert runs["test_bits"].between(3, 9).all()
    assert runs["test_bits"].nunique() == len(runs), "two rules trained alike"
    assert set(runs["status"]) == {"finished"}
    assert matplotlib.image.imread(tmp_path / "characters.png").std() > 0.01

    layers = pd.read_csv(tmp_path / "layers.csv").set_index(["rule", "layer"])
    assert set(layers.index.get_level_values("rule")) == {rule for rule, of in characters.RULES.items() if of}
    # Of two float32 gradients that agree in half of their digits at least, told to two digits.
    same = math.degrees(bounds.HALF_OF_FLOAT32) + 0.005
    assert layers.loc[("sign 0.75", "head"), "gradient_angle"] == pytest.approx(0, abs=same)
    assert layers.loc[("sign 0.75", "blocks.0.mlp.0"), "gradient_angle"] > 10
    assert ("random, attention exact", "blocks.0.attention.qkv") not in layers.index
    watched = feedbackhook.read(tmp_path)
    assert {"error_angle", "gradient_angle", "test_bits"} <= set(watched["metric"])

    monkeypatch.setattr(characters, "CharacterTransformer", refuse)
    run(characters, smoke=True, output=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "runs.csv"), runs)


SETTINGS = {
    "rule": "sign 1",
    "patch": {"mode": "sign"},
    "seed": 0,
    "lr": 1e-3,
    "steps": 2,
    "batch_size": 2,
    "every": 1,
    "blocks": 1,
    "width": 8,
    "heads": 2,
    "context": 8,
}
TEXTS = ("abcdefgh" * 20, "hgfedcba" * 5, "abcdabcd" * 5)


def test_characters_restarts_a_killed_run_and_refuses_other_settings(characters, tmp_path):
    folder = tmp_path / "run"
    with feedbackhook.Recorder(folder) as recorder:
        recorder.add(0, 0, "test_bits", 99.0)  # left by a run that was killed
    characters.train(TEXTS, SETTINGS, folder)
    bits = feedbackhook.read(folder).query("metric == 'test_bits'")
    assert list(bits["step"]) == [0, 1, 2]
    assert bits["value"].max() < 99
    with pytest.raises(ValueError, match=r"other settings \(steps\): remove it"):
        characters.train(TEXTS, {**SETTINGS, "steps": 3}, folder)


def test_a_run_that_diverges_is_told_and_its_rate_is_not_chosen(characters, tmp_path):
    results = [
        characters.train(
            TEXTS,
            {**SETTINGS, "lr": lr, "steps": steps},
            tmp_path / characters.name_of("sign 1", lr, 0),
        )
        for lr, steps in ((1e30, 4), (1e-3, 4))
    ]
    assert [result["status"] for result in results] == ["diverged", "finished"]
    runs = characters.summarize(results)
    assert list(runs["chosen"]) == [False, True]


def test_the_rate_is_chosen_on_the_validation_text_and_by_the_first_seed(characters):
    runs = pd.DataFrame(
        {
            "rule": "random",
            "lr": [0.1, 0.2, 0.2],
            "seed": [0, 0, 1],
            "val_bits": [2.0, 3.0, 1.0],
            "test_bits": [3.0, 2.0, 1.0],
            "status": "finished",
        }
    )
    assert characters.best_lrs(runs) == {"random": 0.1}


def test_tabular_trains_prints_draws_and_does_not_repeat_what_is_finished(
    tabular, tmp_path, monkeypatch, capsys
):
    run(tabular, smoke=True, output=tmp_path)
    out = capsys.readouterr().out
    for expected in ("wine: test accuracy [%]", "diabetes: test R²", "LayerNorm", "tabular.png"):
        assert expected in out
    conditions = pd.read_csv(tmp_path / "tabular.csv")
    assert len(conditions) == 2 * 2 * len(tabular.RULES)
    means = conditions[["fold 0", "fold 1"]].mean(axis=1)
    # Told to four digits: half of the last of the mean, and half of the folds.
    told = 1e-4 * (1 + bounds.HALF_OF_FLOAT64)
    np.testing.assert_allclose(conditions["mean"], means, atol=told, rtol=0)
    assert (conditions["low"] <= conditions["mean"]).all()
    angles = conditions.set_index("rule")["gradient_angle"]
    assert angles["backprop"].isna().all()
    assert (angles["sign 0.75"] > 10).all()
    assert matplotlib.image.imread(tmp_path / "tabular.png").std() > 0.01

    monkeypatch.setattr(tabular, "perceptron", refuse)
    run(tabular, smoke=True, output=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tabular.csv"), conditions)
    with pytest.raises(ValueError, match=r"other settings \(width\): remove it"):
        run(tabular, smoke=True, width=32, output=tmp_path)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("characters", "rules", ["rnadom"]),
        ("tabular", "rules", ["rnadom"]),
        ("tabular", "tables", ["iris"]),
        ("tabular", "normalizations", ["GroupNorm"]),
    ],
)
def test_an_unknown_name_is_an_error_that_tells_the_known(name, option, value, tmp_path):
    with pytest.raises(ValueError, match=rf"unknown {option} \['{value[0]}'\]; known: \w+"):
        run(load_recipe(f"retrofit/{name}"), **{option: value}, output=tmp_path)


@pytest.mark.parametrize("name", ["characters", "tabular"])
def test_the_configuration_beside_a_recipe_has_all_its_options(name):
    options = yaml.safe_load((RETROFIT / f"{name}.yaml").read_text())
    assert list(options) == list(inspect.signature(load_recipe(f"retrofit/{name}").Settings).parameters)
