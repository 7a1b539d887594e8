"""The recipe for timm's train.py.

The weights after a few steps are those of a plain loop with the same patch on the same batches, whose
gradients are the oracle's and not backprop's.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.bounds import HALF_OF_FLOAT32, HALF_OF_FLOAT64
from support.oracle import TOLERANCE
from support.paths import ROOT
from support.trainers import (
    BRSF,
    SIGN,
    assert_told,
    cross_entropy,
    distance,
    gradients_of,
    load_trainer,
    moved,
    plain_loop,
    sgd,
)


@pytest.fixture
def timm_script() -> ModuleType:
    return load_trainer("timm_script")


@pytest.fixture
def stand_in() -> Path:
    pytest.importorskip("timm.task", reason="this version of timm has no timm.task")
    return ROOT / "tests" / "support" / "timm_stand_in.py"


SCRIPT_OPTIONS = {
    "as it is": [],
    "amp": ["--amp"],
    "checkpointing and ema": ["--grad-checkpointing", "--model-ema"],
}
COMPILED = pytest.param("compiled", marks=pytest.mark.slow)


@pytest.mark.parametrize("case", [*SCRIPT_OPTIONS, COMPILED])
def test_a_script_that_calls_create_model_trains_as_a_plain_loop_does(timm_script, stand_in, case, tmp_path):
    import timm

    arguments = SCRIPT_OPTIONS.get(case, ["--torchcompile", "aot_eager"])
    argv, path = list(sys.argv), list(sys.path)
    makers = timm.create_model, timm.models.create_model
    patch = timm_script.run(stand_in, [*arguments, "--out", str(tmp_path / "out.pt")], SIGN)
    assert (timm.create_model, timm.models.create_model) == makers
    assert (sys.argv, sys.path) == (argv, path)
    out = torch.load(tmp_path / "out.pt", weights_only=True)

    start = timm.create_model("test_vit", img_size=32, depth=2, num_classes=10)
    if case != "amp":
        start.double()
    start.load_state_dict(out["start"])

    def loss_of(m, batch):
        with torch.autocast("cpu", torch.bfloat16) if case == "amp" else nullcontext():
            return cross_entropy(m, batch)

    loop = functools.partial(plain_loop, batches=out["batches"], loss_of=loss_of, optimizer=sgd)
    model = copy.deepcopy(start)
    want = loop(model, SIGN, tolerance=TOLERANCE if case == "as it is" else None)
    exact = loop(copy.deepcopy(start), None)
    # Under amp sums are in float32. Compiled code adds in a different order.
    close = {"amp": HALF_OF_FLOAT32, "compiled": HALF_OF_FLOAT64}.get(case, TOLERANCE)
    assert distance(moved(out["end"], start), moved(want, start)) <= close
    assert distance(out["gradients"], gradients_of(model)) <= close
    assert distance(moved(out["end"], start), moved(exact, start)) > 0.1
    counted = {row.rerouted for row in patch.layers if row.name != "patch_embed.proj"}
    assert counted == ({0} if case == "compiled" else {2})


def test_the_recipe_runs_a_script_on_the_digits(timm_script, stand_in, tmp_path, capsys):
    timm_script.main(stand_in, feedback=SIGN, output=tmp_path / "run", smoke=True)
    assert_told(capsys.readouterr().out, ["blocks.0.attn.qkv", "head"], rerouted=2)
    for split, count in {"train": 80, "validation": 20}.items():
        assert len(list((tmp_path / "run" / "digits" / split).glob("*/*.png"))) == count
    timm_script.main(stand_in, feedback=SIGN, output=tmp_path / "run")  # its rows are below the first run's
    assert "training loss: 2." in capsys.readouterr().out


@pytest.mark.slow
def test_of_compiled_code_the_recipe_says_that_it_counts_nothing(timm_script, stand_in, tmp_path, capsys):
    timm_script.main(stand_in, ["--torchcompile", "aot_eager"], SIGN, output=tmp_path / "run")
    assert "no call was counted" in capsys.readouterr().out


def test_options_of_the_script_stand_behind_two_dashes(timm_script, monkeypatch):
    called = []

    @functools.wraps(timm_script.main)
    def spy(**arguments: Any) -> None:
        called.append(arguments)

    monkeypatch.setattr(timm_script, "main", spy)
    passed = ["data", "--model", "x", "--scale", "0.1", "1"]
    timm_script.cli(["--script", "a.py", "--feedback.mode", "brSF", "--", *passed])
    timm_script.cli(["--script", "a.py"])
    assert called[0]["arguments"] == passed
    assert called[0]["feedback"] == BRSF
    assert called[1]["arguments"] is None


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "there is no file"),
        ("", [], r"did not call timm\.create_model"),
        ("", ["--torchscript"], "cannot be patched"),
    ],
    ids=["no script", "no model", "torchscript"],
)
def test_what_the_recipe_cannot_run_is_said(timm_script, tmp_path, text, arguments, message):
    script = tmp_path / "script.py"
    if text is not None:
        script.write_text(text)
    with pytest.raises(SystemExit, match=message):
        timm_script.run(script, arguments, SIGN)


def test_a_script_that_fails_leaves_create_model_as_it_was(timm_script, tmp_path):
    import timm

    before, script = timm.models.create_model, tmp_path / "script.py"
    script.write_text("raise KeyError('its own')")
    with pytest.raises(KeyError, match="its own"):
        timm_script.run(script, [], SIGN)
    assert timm.models.create_model is timm.create_model is before


TIMM_TRAIN = os.environ.get("FEEDBACKHOOK_TIMM_TRAIN")
REAL_OPTIONS = {
    "as it is": [],
    "amp": ["--amp", "--amp-dtype", "bfloat16"],
    "checkpointing and ema": ["--grad-checkpointing", "--model-ema"],
    "accumulation": ["--grad-accum-steps", "2"],
    "channels last": ["--channels-last"],
    "compiled": ["--torchcompile", "aot_eager"],
}


@pytest.mark.skipif(TIMM_TRAIN is None, reason="FEEDBACKHOOK_TIMM_TRAIN is not the path of timm's train.py")
@pytest.mark.parametrize("model_name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("case", REAL_OPTIONS)
def test_timms_own_script_trains_as_a_plain_loop_does(timm_script, case, model_name, tmp_path, monkeypatch):
    import timm
    from timm.data.loader import PrefetchLoader

    given, make = REAL_OPTIONS[case], timm.create_model
    if not torch.cuda.is_available():  # scripts of 2023 call it in their validation on CPUs, too
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    starts, seen, pull = [], {}, PrefetchLoader.__iter__

    def create_model(*args, **kwargs):
        model = make(*args, **kwargs)
        starts.append(copy.deepcopy(model))
        return model

    def batches_of(loader):
        for batch in pull(loader):
            seen.setdefault(id(loader), []).append([part.clone() for part in batch])
            yield batch

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(timm.models, "create_model", create_model)
    monkeypatch.setattr(PrefetchLoader, "__iter__", batches_of)
    plain = {"model": model_name, "opt": "momentum", "lr": 0.1, "weight-decay": 0, "smoothing": 0}
    arguments = [f"--{name}={value}" for name, value in plain.items()]
    output = tmp_path / "run"
    timm_script.main(Path(str(TIMM_TRAIN)), [*arguments, "--no-aug", *given], SIGN, output=output, smoke=True)
    (start,) = starts
    batches = next(iter(seen.values()))  # the first loader is that of the training set
    assert len(batches) == 5
    accumulated = 2 if case == "accumulation" else 1
    if case == "channels last":
        start.to(memory_format=torch.channels_last)
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    if case == "checkpointing and ema":
        start.set_grad_checkpointing(True)

    def loss_of(m, group):
        with torch.autocast("cpu", torch.bfloat16) if case == "amp" else nullcontext():
            return sum(cross_entropy(m, batch) for batch in group) / len(group)

    groups = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    loop = functools.partial(plain_loop, loss_of=loss_of, optimizer=sgd, tolerance=None)
    start.train()
    want, exact = (loop(copy.deepcopy(start), rule, groups) for rule in (SIGN, None))
    saved = torch.load(output / "last.pth.tar", weights_only=False)["state_dict"]
    saved = {name.removeprefix("_orig_mod."): value for name, value in saved.items()}
    got, want, exact = (moved(end, start) for end in (saved, want, exact))
    assert distance(got, want) <= HALF_OF_FLOAT32
    assert distance(got, exact) > 0.1
    if case == "as it is":  # and the plain loop is the oracle's
        double = [[(x.double(), y) for x, y in groups[0]]]
        plain_loop(copy.deepcopy(start).double(), SIGN, double, loss_of, sgd)
