"""The command line: what it prints, which files it leaves, and one clear line for each error."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from feedbackhook.cli import main
from feedbackhook.experiments.data.split import Split
from feedbackhook.experiments.training import evaluate as evaluation
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.store.recorder import Recorder, read

# a network and images that train in a second
SMALL = ["--model.name", "timm/test_resnet", "--data.size", "16", "--optimizer.lr", "0.001"]


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_train_says_how_it_went_and_where_all_lies(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--protocol.epochs", "2", "--protocol.seed", "3", "--protocol.device", "cpu"]
    assert main(["train", *SMALL, *given]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    begin, *lines = out.splitlines()
    parameters = sum(
        p.numel() for p in timm.create_model("test_resnet", num_classes=10, in_chans=1).parameters()
    )
    threads = torch.get_num_threads()
    assert begin == (
        f"timm/test_resnet on 1x16x16 pixels, {parameters:,} parameters; digits: 1,437 training, 360 test, "
        f"10 classes; sign; cpu ({threads} thread{'' if threads == 1 else 's'})"
    )
    assert [line.partition(":")[0] for line in lines] == [
        "finished after 2 epochs",
        "test error",
        "run folder",
        "figures",
    ]
    errors = read("runs/digits-sign-seed3").query("metric == 'test_error'")["value"].tolist()
    assert lines[1].startswith(f"test error: last {errors[2]:.2f}%, best {min(errors[1:]):.2f}%")
    assert lines[2] == "run folder: runs/digits-sign-seed3"
    drawn = list(Path("runs/digits-sign-seed3/figures").iterdir())
    assert lines[3] == f"figures: {len(drawn)} in runs/digits-sign-seed3/figures"


def test_the_first_line_names_condition_options_and_what_is_held_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [
        "--condition",
        "brSF+BM concordance=0.75",
        "--data.val_fraction",
        "0.1",
        "--protocol.epochs",
        "1",
    ]
    assert main(["train", *SMALL, *given, "--record.figures", "false"]) == 0
    begin = capsys.readouterr().out.splitlines()[0]
    assert "; digits: 1,293 training, 144 validation, 360 test, 10 classes; " in begin
    assert "; brSF concordance=0.75 (brSF+BM concordance=0.75); " in begin


def test_a_config_file_holds_and_options_change_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(
        "model: {name: timm/test_resnet}\n"
        "data: {size: 16}\n"
        "feedback: {mode: frSF, options: {concordance: 0.75}}\n"
        "protocol: {epochs: 1, batch_size: 200}\n"
        "output: here\n"
    )
    assert (
        main(["train", "my.yaml", "--feedback.options.concordance", "0.5", "--protocol.batch_size", "300"])
        == 0
    )
    stored = yaml.safe_load(Path("here/config.yaml").read_text())
    assert stored["feedback"]["options"] == {"concordance": 0.5}
    assert stored["protocol"]["batch_size"] == 300
    assert stored["model"]["name"] == "timm/test_resnet"
    table = read("here")
    agreement = table[(table.metric == "sign_agreement") & (table.step == 0)]["value"]
    assert agreement.iloc[-1] == pytest.approx(0.5, abs=0.1)

    # the config.yaml of a run is itself a configuration file
    assert main(["train", "here/config.yaml", "--output", "there", "--feedback.mode", "null"]) == 0
    assert yaml.safe_load(Path("there/config.yaml").read_text())["feedback"]["mode"] is None
    assert set(read("there")["layer"].dropna()) == set()
    capsys.readouterr()
    assert main(["train", "here/config.yaml", "--resume"]) == 0
    assert "finished after 1 epoch\n" in capsys.readouterr().out


def test_plot_draws_every_figure_and_says_which_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--output", "run", "--protocol.epochs", "1"]) == 0
    capsys.readouterr()
    assert main(["plot", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "figure: run/figures/error_angle.svg" in lines
    assert "no gradient_angle: the table holds no gradient_angle: set record.gradient_angle_every" in lines
    drawn = [Path(line.partition(": ")[2]) for line in lines if line.startswith("figure: ")]
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert main(["plot", "run", "--output", "elsewhere", "--formats", "[svg]"]) == 0
    assert {path.suffix for path in Path("elsewhere").iterdir()} == {".svg"}


def test_plot_of_what_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert main(["plot", "empty"]) == 2
    assert "no table in" in capsys.readouterr().err
    assert not any(Path("empty").iterdir())


def test_an_interruption_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", *SMALL, "--protocol.epochs", "2", "--output", "run"]
    evaluate = evaluation.loss_and_error

    def interrupt(state: TrainingState, split: Split, recorder: Recorder) -> tuple[float, float]:
        if state.epoch == 2:
            raise KeyboardInterrupt
        return evaluate(state, split, recorder)

    with monkeypatch.context() as context:
        context.setattr(evaluation, "loss_and_error", interrupt)
        assert main(command) == 130
    assert "--resume" in capsys.readouterr().out
    assert json.loads(Path("run/status.json").read_text())["status"] == "interrupted"
    assert main([*command, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "finished after 2 epochs" in out


def test_a_diverged_run_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    rough = ["--feedback.mode", "uSF", "--optimizer.name", "sgd", "--optimizer.lr", "10"]
    assert main(["train", "--protocol.epochs", "1", *rough, "--output", "run"]) == 0
    out = capsys.readouterr().out
    assert "diverged: train loss is " in out
    assert "in epoch 1, after" in out
    assert "test error: last " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "'tran'"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "bad.yaml"], "'data.nam'; did you mean 'data.name'"),
        (["train", "broken.yaml"], "parsing config: while parsing a flow mapping"),
        (["train", "--data.nam", "digits"], "--data.nam digits; did you mean '--data.name'"),
        (["train", "--protocol.epoch=3"], "did you mean '--protocol.epochs', "),
        (["table", "runs", "--outputs", "x"], "did you mean '--output'?"),
        (["sweep", "--datasets", "digits"], "datasets must be a list (such as [digits]), not digits"),
        (
            ["plot", "runs", "--figures", "error"],
            "figures must be a list (such as [error]) or null, not error",
        ),
        (["train", "--protocol.epochs", "many"], "protocol.epochs must be a whole number, not many"),
        (["train", "--optimizer.name", "adam"], "batch_manhattan"),
        (["train", "--data.size", "big"], "data.size must be a whole number or null, not big"),
        (["train", "--data.name", "MNIST", "--data.root", "nowhere"], "train-images-idx3-ubyte is missing"),
        (["train", "--data.name", "imagefolder:nowhere"], "nowhere/train is missing"),
        (["train", "--feedback.options.concordance", "1.3"], "concordance"),
        (["train", "--feedback.mode", "sgin"], "did you mean 'sign'?"),
        (["train", "--feedback.options.concordanse", "1"], "did you mean 'concordance'?"),
        (["train", "--data.name", "MNST"], "'MNST' is unknown; did you mean 'MNIST', "),
        (["train", "--data.name", "flowers17"], "'flowers17' is unknown; did you mean 'Flowers17' or "),
        (["train", "--model.name", "liao2016/mnst"], "'liao2016/mnst'; did you mean 'liao2016/mnist', "),
        (["train", "--model.name", "resnet18"], "'resnet18'; did you mean 'timm/resnet18', "),
        (["train", "--optimizer.name", "batchmanhattan"], "did you mean 'batch_manhattan'?"),
        (["train", "--model.frozen", "Middle"], "model.frozen must be 'Top' or 'Bottom' or null, not Middle"),
        (["train", "--data", "digits"], "data must be a mapping of settings ({NAME: VALUE}), not digits"),
        (["train", "--feedback.include", "head"], "head"),
        (["train", "--model.name", "timm/resnet81"], "resnet81"),
        (["train", "--output", "taken"], "is not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text("data: {nam: digits}\n")
    Path("broken.yaml").write_text("data: {name\n")
    Path("taken").mkdir()
    Path("taken/thesis.tex").write_text("")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("feedbackhook: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("runs").exists()


def test_without_a_command_the_help_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 0
    assert "train a network and leave a run folder" in capsys.readouterr().out


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for key in ("--data.name", "--model.batch_norm {none,paper,affine}", "--feedback.mode", "--resume"):
        assert key in out


def test_on_a_terminal_it_is_a_bar_with_loss_and_accuracy() -> None:
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "feedbackhook", "train", *SMALL, "--protocol.epochs", "1"]
    with subprocess.Popen(
        command, stdout=writer, stderr=writer, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(writer)
        shown = b""
        while True:
            try:
                shown += os.read(reader, 65536)
            except OSError:  # the terminal's end, on Linux
                break
    os.close(reader)
    text = shown.decode()
    assert process.returncode == 0
    assert "━" in text
    assert "1/1" in text
    assert "loss " in text
    assert "nan" not in text
    assert "test accuracy " in text
    assert "epoch 1/1: " not in text
    assert "run folder: runs/digits-sign-seed0" in text
