"""The recipes for the paper run, on very little data."""

from dataclasses import fields
from io import StringIO

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from jsonargparse import ArgumentParser
from rich.console import Console
from support.recipes import RECIPES, load_recipe

from feedbackhook.cli import main
from feedbackhook.experiments.config import SweepConfig
from feedbackhook.experiments.sweep.grid import plan
from feedbackhook.liao2016 import published
from feedbackhook.liao2016.datasets import DATASETS
from feedbackhook.store.run_folder import RunResult


@pytest.fixture
def demo():
    with mpl.rc_context():
        yield load_recipe("liao2016/demo")
        plt.close("all")


def test_the_demo_has_the_papers_conditions(demo, tmp_path):
    configs = {
        (row["rule"], row["concordance"]): demo.configuration(row, 0, 15, tmp_path)
        for row in demo.conditions()
    }
    assert set(configs) == {("backprop", None), ("RndF", None), ("uSF", None)} | {
        (rule, concordance) for rule in ("frSF", "brSF") for concordance in (1, 0.75, 0.5, 0.25, 0)
    }
    assert len({config.output for config in configs.values()}) == len(configs)
    for (rule, _), config in configs.items():
        with_both = (config.model.batch_norm, config.optimizer.name) == ("paper", "batch_manhattan")
        with_neither = (config.model.batch_norm, config.optimizer.name) == ("none", "sgd")
        assert with_neither if rule == "uSF" else with_both


def test_the_demo_trains_prints_and_draws_and_does_not_repeat_what_is_finished(
    demo, tmp_path, monkeypatch, capsys
):
    few = [row for row in demo.conditions() if row["concordance"] in (None, 1.0)]
    monkeypatch.setattr(demo, "conditions", lambda: few)
    demo.main(epochs=1, seeds=1, jobs=1, output=tmp_path)
    first = capsys.readouterr().out
    for expected in ("5 runs of 1 epochs", "Manhattan 5e-05", "backprop", "frSF", "demo.png", "errors.csv"):
        assert expected in first
    runs = pd.read_csv(tmp_path / "errors.csv")
    assert list(runs["rule"]) == ["backprop", "frSF", "brSF", "RndF", "uSF"]
    assert runs["last_error"].between(0, 100).all()
    assert (runs.loc[runs["status"] == "finished", "epochs"] == 1).all()
    assert set(runs.loc[runs["status"] != "finished", "rule"]) <= {"uSF"}  # it may diverge
    assert plt.imread(tmp_path / "demo.png").std() > 0.01

    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics/*.parquet")}
    assert {path.parent.parent.name for path in trained} == set(runs["run"])
    demo.main(epochs=1, seeds=1, jobs=1, output=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics/*.parquet")} == trained


def test_without_a_terminal_the_demo_tells_now_and_then_how_far_it_is(demo, tmp_path, monkeypatch):
    results = [RunResult(tmp_path / f"brSF-{n}", "finished", last_error=n) for n in range(4)]
    clock = iter([0.0, 1.0, 11.0, 12.0, 13.0])  # when it begins, and when each run ends
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    out = StringIO()
    assert list(demo.told(results, 4, Console(file=out, width=200))) == results
    assert out.getvalue().splitlines() == [
        "  11 s: 2 of 4 runs; brSF-1 finished with 1.00% test error",
        "  13 s: 4 of 4 runs; brSF-3 finished with 3.00% test error",
    ]


def test_the_demo_draws_every_condition(demo):
    runs = pd.DataFrame(
        {**row, "seed": seed, "last_error": error, "run": f"{row['rule']}{row['concordance']}{seed}"}
        for error, row in enumerate(demo.conditions(), 1)
        for seed in (0, 1)
    )
    epochs = pd.concat([runs.assign(epoch=epoch, error=runs["last_error"] + epoch) for epoch in range(3)])
    figure = demo.draw(runs, epochs)
    fixed, redrawn, last = figure.axes
    for axes in (fixed, redrawn):
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel() == "test error [%]"
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert shown == ["1", "0.75", "0.5", "0.25", "0", "backprop"]
    of_frsf = next(line for line in last.lines if line.get_marker() == "o" and len(line.get_xdata()) == 5)
    assert list(of_frsf.get_xdata()) == [0, 0.25, 0.5, 0.75, 1]
    assert list(of_frsf.get_ydata()) == [6, 5, 4, 3, 2]
    shown = [text.get_text() for text in last.get_legend().get_texts()]
    assert shown == ["frSF", "brSF", "backprop", "RndF", "uSF without BN and BM"]


def test_the_example_configuration_is_valid(tmp_path):
    from feedbackhook.cli import main
    from feedbackhook.store.run_folder import RunFolder

    config = RECIPES / "liao2016" / "digits.yaml"
    output = tmp_path / "run"
    assert main(["train", str(config), "--protocol.epochs", "1", "--output", str(output)]) == 0
    result = RunFolder(output).result()
    assert result is not None
    assert result.status == "finished"


def test_alignment_trains_and_tells_when_the_angle_falls(tmp_path, capsys):
    alignment = load_recipe("liao2016/alignment")
    alignment.main(data="digits", epochs=2, seeds=2, threads=1, bound=120.0, output=tmp_path)
    out = capsys.readouterr().out
    assert "step 0, epoch 1" in out
    runs = pd.read_csv(tmp_path / "alignment.csv")
    assert list(runs["run"]) == ["seed0", "seed1"]
    assert runs["first_angle"].between(85, 95).all()
    assert set(pd.read_csv(tmp_path / "angles.csv")["metric"]) == {"error_angle", "weight_angle"}
    assert plt.imread(tmp_path / "error_angle.png").std() > 0.01

    never = alignment.summarize(alignment.read(tmp_path), bound=1.0)
    assert never["step_below"].isna().all()
    assert "never" in capture_table(alignment.shown(never, 1.0))


def capture_table(table):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


EXPERIMENTS = {"a": 11, "b": 11, "c1": 5, "c2": 9, "misc": 8}


def sweep_of(name, *options):
    """The sweep that `feedbackhook sweep recipes/liao2016/NAME.yaml OPTIONS` would run."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(SweepConfig)
    given = parser.parse_args(["--config", str(RECIPES / "liao2016" / f"{name}.yaml"), *options])
    given = parser.instantiate(given)
    return SweepConfig(**{field.name: given[field.name] for field in fields(SweepConfig)})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_the_papers_in_full_and_small_by_one_option(experiment):
    paper = published.error_rates().rename(columns=published.DATASETS)
    names = [dataset.name for dataset in DATASETS]
    config = sweep_of(f"experiment_{experiment}")
    runs = plan(config)
    conditions = {run.condition for run in runs}
    assert len(conditions) == EXPERIMENTS[experiment]
    assert conditions <= set(paper.index)
    for run in runs:  # the paper has a figure for each cell
        assert paper.loc[run.condition, run.dataset] > 0
        assert run.config.protocol.epochs == 65
    assert {run.lr_factor for run in runs} == {100, 10, 1, 0.1, 0.01}
    assert config.data.val_fraction == 0.1
    datasets = {run.dataset for run in runs}
    assert datasets == set(names[:6]) if experiment == "misc" else datasets == set(names)
    small = plan(sweep_of(f"experiment_{experiment}", "--small", "digits"))
    assert {run.condition for run in small} == conditions
    assert {(run.dataset, run.config.protocol.epochs) for run in small} == {("digits", 8)}


def test_the_experiments_together_are_all_of_the_papers_conditions():
    runs = [run for name in EXPERIMENTS for run in plan(sweep_of(f"experiment_{name}", "--small", "digits"))]
    assert {run.condition for run in runs} == set(published.error_rates().index)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_small(experiment, tmp_path, capsys):
    recipe, output = RECIPES / "liao2016" / f"experiment_{experiment}.yaml", tmp_path / "sweep"
    short = [
        "--protocol.epochs",
        "1",
        "--protocol.lr_factors",
        "1",
        "--workers",
        "1",
        "--output",
        str(output),
    ]
    assert main(["sweep", str(recipe), "--small", "digits", *short]) == 0
    assert main(["table", f"{output}-digits"]) == 0
    out = capsys.readouterr().out
    assert f"{EXPERIMENTS[experiment]} finished" in out
    assert out.count("\n| ") == EXPERIMENTS[experiment] + 1


CORE = {
    *("SGD", "BN", "BN+BM", "uSF", "NuSF", "uSF+BN+BM", "RndF", "RndF+BN+BM"),
    *(f"{rule}+BN+BM concordance={share}" for rule in ("brSF", "frSF") for share in ("1", "0.5")),
}
AGAIN = {"brSF+BN+BM", "frSF+BN+BM", "BM1", "uSF+BN+BM1"}
"""Conditions of the paper that another name has already: without a concordance it is 1, and BM is BM1."""
ALL = set(published.error_rates().index) - AGAIN
CONTROLS = {name for name in ALL if name.endswith(("Bottom", "Top", "BM2", "BM3"))}
EVIDENCE = {
    **dict.fromkeys(["mnist", "cifar10", "phoneme"], ALL),
    "flowers17": ALL - CONTROLS,
    **dict.fromkeys(["lfw", "caltech101", "scene15"], CORE),
}


@pytest.mark.parametrize(("name", "conditions"), EVIDENCE.items(), ids=EVIDENCE.keys())
def test_a_sweep_of_the_evidence_has_its_conditions_at_five_rates(name, conditions):
    runs = plan(sweep_of(f"evidence/{name}"))
    assert len({run.dataset for run in runs}) == 1
    assert {run.condition for run in runs} == conditions
    assert conditions <= ALL
    seeds = 4 if name == "phoneme" else 1
    assert len({run.seed for run in runs}) == seeds
    assert len({run.lr_factor for run in runs}) == 5
    assert len(runs) == 5 * seeds * len({(run.condition, run.procedure.name) for run in runs})


def test_a_resnet20_has_the_core_conditions_with_its_own_batch_normalization():
    """So nothing inserts another."""
    runs = plan(sweep_of("evidence/resnet20"))
    assert {run.condition for run in runs} == {name.replace("BN+", "") for name in CORE - {"BN"}}
    assert {run.config.model.batch_norm for run in runs} == {"none"}
