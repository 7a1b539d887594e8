"""One run on two processes equals it on one, and what cannot is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from support import bounds
from support.job import Job, precisely, stopped_before
from support.paths import python_path
from support.process_cases import CHANGES, made
from torch import nn

from feedbackhook import read
from feedbackhook.cli import main
from feedbackhook.experiments.config import (
    ConfigError,
    FeedbackConfig,
    ProtocolConfig,
    RunConfig,
)
from feedbackhook.experiments.models.batch_norm import other_batch_statistics
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.run import train as train_as_it_is
from feedbackhook.store.run_folder import RunResult

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# How far two processes may be from one: relative, and absolute where a value is near zero. They sum in
# another order and so round differently. Half of float64's digits are left for what 24 steps make of a last
# bit; any mistake shows in the other half.
HALF = torch.finfo(torch.float64).eps ** 0.5
# In bf16 each process rounds the gradient of its share, and one process that of the whole mini-batch. A
# number is rounded by at most 2^-8 of itself: in each of four layers on the way up and on the way down, and
# once in the gradient. Later steps multiply that, so only what precedes the first update is compared.
BF16 = (2 * 4 + 1) * 2.0**-8
FLOAT32 = 1e3 * 2.0**-24  # what a thousand roundings in float32 come to, were they all to one side
IMAGE = 100 / 101 + 1e-9  # a test image, in percent: whose class may turn by the last bit


def launched(arguments: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """What torchrun has left; none of its processes is left behind."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONPATH": python_path(),
    }
    process = subprocess.Popen(
        [*TORCHRUN, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=bounds.HANG)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def trained(folder: Path, jobs: dict[str, Job]) -> dict[str, list[list[str]]]:
    """How each job ended in two processes, by rank."""
    (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    done = launched(["-m", "support.processes_worker", str(folder)])
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in jobs}


def interrupted(config: RunConfig) -> None:
    """One process trains the first epoch."""
    with stopped_before(2), pytest.raises(KeyboardInterrupt):
        train(config)


def values(config: RunConfig) -> pandas.Series:
    table = read(str(config.output)).fillna({"layer": ""})
    return table.set_index(["step", "epoch", "layer", "depth", "metric"])["value"].sort_index()


def furthest(got: pandas.Series, want: pandas.Series, bound: float = HALF) -> float:
    """The largest difference between two tables of the same rows, in units of what is allowed: of losses,
    norms and angles the bound (relative, and absolute below 1), of errors an image."""
    assert got.index.equals(want.index)
    assert (got.isna() == want.isna()).all()
    errors = got.index.get_level_values("metric").str.endswith(("_error", "_accuracy"))
    limit = (bound * want.abs()).clip(lower=bound).where(~errors, IMAGE)
    return float(((got - want).abs() / limit).max())


def train(config: RunConfig, resume: bool = False) -> RunResult:
    """In this process, as the worker does."""
    with precisely(config):
        return train_as_it_is(config, resume=resume)


def in_one_process(change: str, tmp: Path) -> RunConfig:
    """The run of one process, trained when it is first asked for."""
    one = made(tmp, change, f"one-{change}")
    if not Path(str(one.output)).exists():
        train(one)
    return one


def compared(config: RunConfig, change: str, tmp: Path) -> float:
    """How far a run is from one process's of the same case, in units of what is allowed."""
    got, want = values(config), values(in_one_process(change, tmp))
    if config.protocol.precision != "bf16":
        return furthest(got, want)
    begun = (table[table.index.get_level_values("step") == 0] for table in (got, want))
    return furthest(*begun, BF16)


QUICK = ("plain", "sharded", "learned_sharded", "paper_norm", "bf16")
SLOW = tuple(name for name in CHANGES if name not in QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def quick(folder: Path) -> dict[str, list[list[str]]]:
    """What the tests left to every change look at, in one start of two processes."""
    jobs = {name: Job(made(folder, name, name)) for name in QUICK}
    jobs["wrong"] = Job(made(folder, "plain", "wrong"), wrong_shares=True)
    jobs["wrong bf16"] = Job(made(folder, "bf16", "wrong-bf16"), wrong_shares=True)
    jobs["stopped"] = Job(made(folder, "plain", "stopped"), stop=2)
    jobs["begun"] = Job(made(folder, "plain", "begun"), resume=True)
    interrupted(jobs["begun"].config)
    diverging = made(folder, "plain", "diverging")
    diverging.optimizer.lr = 1e30
    jobs["diverging"] = Job(diverging)
    jobs |= {f"refused {name}": Job(config) for name, (config, _) in refused(folder).items()}
    return trained(folder, jobs)


def refused(folder: Path) -> dict[str, tuple[RunConfig, str]]:
    """Configurations, and what is said of them."""
    odd = made(folder, "plain", "odd")
    odd.protocol.batch_size = 25
    later = made(folder, "plain", "later")
    later.protocol.batch_sizes = {1: 30}
    later.protocol.gradient_accumulation_steps, later.record.gradient_angle_every = 2, 0
    angles = made(folder, "sharded", "angles")
    angles.record.gradient_angle_every = 5
    device = made(folder, "plain", "device")
    device.protocol.device = "cuda:1"
    return {
        "odd": (
            odd,
            "a mini-batch of 25 images cannot be split evenly over 2 processes .* multiple of 2, such",
        ),
        "later": (
            later,
            "a mini-batch of 30 images .* 2 processes with 2 gradient accumulation .* multiple of 4, such",
        ),
        "angles": (angles, "gradient_angle_every cannot be measured with protocol.strategy fsdp2"),
        "device": (device, "'cuda:1' is one device, and torchrun has started 2 processes"),
        "occupied": (made(folder, "plain", "plain"), "holds a run .finished, epoch 2."),
    }


@pytest.fixture(scope="module")
def slow(folder: Path) -> dict[str, list[list[str]]]:
    jobs = {name: Job(made(folder, name, name)) for name in SLOW}
    for name in ("sharded", "adamw_sharded", "manhattan_sharded"):
        jobs[f"stopped {name}"] = Job(made(folder, name, f"stopped-{name}"), stop=2)
        jobs[f"begun {name}"] = Job(made(folder, name, f"begun-{name}"), resume=True)
        interrupted(jobs[f"begun {name}"].config)
    return trained(folder, jobs)


def agrees(outcomes: dict[str, list[list[str]]], name: str, folder: Path) -> None:
    assert outcomes[name] == [["finished", "None"]] * 2
    away = compared(made(folder, name, name), name, folder)
    print(f"{name}: {away:.3g} of what is allowed")
    assert away <= 1


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_train_as_one_does(name: str, quick: Any, folder: Path) -> None:
    agrees(quick, name, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_train_as_one_does_whatever_is_set(name: str, slow: Any, folder: Path) -> None:
    agrees(slow, name, folder)


@pytest.mark.parametrize("name", QUICK)
def test_none_of_them_is_backprop(name: str, quick: Any, folder: Path) -> None:
    exact = made(folder, name, f"backprop-{name}")
    exact.feedback, exact.record.gradient_angle_every = FeedbackConfig("symmetric"), 0
    train(exact)
    got, want = first_gradients(folder / name), first_gradients(folder / f"backprop-{name}")
    assert abs(got / want - 1).max() > (BF16 if name == "bf16" else 1000 * HALF)


def first_gradients(run: Path) -> pandas.Series:
    """Norms in the first step, by layer."""
    rows = read(run).query("step == 0 and metric == 'gradient_norm'")
    return rows.fillna({"layer": ""}).set_index("layer")["value"]


def test_bf16_is_another_precision(quick: Any, folder: Path) -> None:
    """Two processes agree with one as well as bf16 lets them, and not with float64 as float32 would."""
    two = first_gradients(folder / "bf16")
    one, full = (
        first_gradients(Path(str(in_one_process(name, folder).output))) for name in ("bf16", "plain")
    )
    assert abs(two / one - 1).max() <= BF16
    for half in (two, one):
        assert abs(half / full - 1).max() > FLOAT32


def test_a_wrong_share_of_the_mini_batch_would_show(quick: Any, folder: Path) -> None:
    assert quick["wrong"] == [["finished", "None"]] * 2
    assert compared(made(folder, "plain", "wrong"), "plain", folder) > 1000
    assert quick["wrong bf16"] == [["finished", "None"]] * 2
    assert compared(made(folder, "bf16", "wrong-bf16"), "bf16", folder) > 1


def test_another_number_of_processes_goes_on(quick: Any, folder: Path) -> None:
    assert quick["begun"] == [["finished", "None"]] * 2
    assert compared(made(folder, "plain", "begun"), "plain", folder) <= 1
    assert quick["stopped"] == [["KeyboardInterrupt", ""]] * 2
    one = made(folder, "plain", "stopped")
    assert json.loads((folder / "stopped" / "status.json").read_text())["status"] == "interrupted"
    assert train(one, resume=True).status == "finished"
    assert compared(one, "plain", folder) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "adamw_sharded", "manhattan_sharded"])
def test_sharded_runs_go_on_in_another_number_of_processes(name: str, slow: Any, folder: Path) -> None:
    assert slow[f"begun {name}"] == [["finished", "None"]] * 2
    assert compared(made(folder, name, f"begun-{name}"), name, folder) <= 1
    one = made(folder, name, f"stopped-{name}")
    assert train(one, resume=True).status == "finished"
    assert compared(one, name, folder) <= 1


def test_the_files_are_those_of_one_process(quick: Any, folder: Path) -> None:
    train(replace(made(folder, "sharded", "files")))
    for name in ("plain", "sharded"):
        got, want = (torch.load(folder / run / "checkpoint.pt", weights_only=True) for run in (name, "files"))
        assert got.keys() == want.keys()
        assert got["patch"] == want["patch"]  # the draws among it: none but those of the 24 updates
        assert {row["draws"] for row in got["patch"]["layers"].values()} == {24}
        assert torch.equal(got["order"], want["order"])
        assert torch.equal(got["random"], want["random"])
        assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
        tensors = [
            {**state["model"], **{f"{i}": row["momentum_buffer"] for i, row in rows.items()}}
            for state in (got, want)
            for rows in [state["optimizer"]["state"]]
        ]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            assert type(tensor) is torch.Tensor
            torch.testing.assert_close(tensor, tensors[1][key], rtol=HALF, atol=HALF)
        for weights in ("best", "last"):
            saved = load_file(folder / name / f"{weights}.safetensors")
            assert saved.keys() == got["model"].keys()
    config = (folder / "plain" / "config.yaml").read_text()
    assert "processes: 2" in config
    assert "processes:" not in (folder / "files" / "config.yaml").read_text()


def test_a_diverging_run_ends_in_all_processes(quick: Any, folder: Path) -> None:
    (status, reason), second = quick["diverging"]
    assert (status, reason) == tuple(second)
    assert status == "diverged"
    assert "train loss" in reason


@pytest.mark.parametrize("name", ["odd", "later", "angles", "device", "occupied"])
def test_what_cannot_be_is_refused_and_said_once(name: str, quick: Any, folder: Path) -> None:
    first, second = quick[f"refused {name}"]
    assert [first[0], second[0]] == ["ConfigError", "ReportedByMain"]
    with pytest.raises(ConfigError, match=refused(folder)[name][1]):
        raise ConfigError(first[1])


# A thread of the process group that outlives it can abort the process at its exit.
THREADS_AFTER_MAIN = """
import os
import sys
from pathlib import Path
from feedbackhook.cli import main

status = main(sys.argv[1:])
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
counted = sum("gloo" in name for name in names)
os.write(1, b"of gloo: %d " % counted)  # in one piece, whatever the other process prints
sys.exit(status)
"""


@pytest.mark.slow
def test_the_command_trains_on_two_processes_and_refuses_once(folder: Path) -> None:
    options = ["--data.train_images", "100", "--data.test_images", "50", "--protocol.epochs", "1"]
    options += ["--output", str(folder / "command"), "--record.figures", "false", "--protocol.batch_size"]
    command = ["-m", "feedbackhook", "train", *options]
    done = launched([*command, "20"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 1 epoch\n") == 1
    script = folder / "threads_after_main.py"
    script.write_text(THREADS_AFTER_MAIN)
    done = launched([str(script), "train", *options, "20"])
    assert done.returncode != 0
    assert done.stdout.count("of gloo: 0") >= 1  # the other process may have been stopped before it prints
    assert done.stdout.count("of gloo:") == done.stdout.count("of gloo: 0")
    assert done.stderr.count("feedbackhook: error:") == 1
    assert done.stderr.count("exitcode  : 2") >= 1
    assert (
        'Traceback (most recent call last):\n  File "<frozen runpy>' not in done.stderr.partition("FAILED")[2]
    )


def test_one_process_accumulates_to_the_same(folder: Path) -> None:
    config = made(folder, "accumulated", "parts")
    train(config)
    whole = made(folder, "accumulated", "whole")
    whole.protocol.gradient_accumulation_steps = 1
    train(whole)
    assert furthest(values(config), values(whole)) <= 1


@pytest.mark.parametrize(
    ("field", "value"), [("precision", "bfloat16"), ("strategy", "fsdp"), ("gradient_accumulation_steps", 0)]
)
def test_options_of_the_processes_are_checked(field: str, value: object, tmp_path: Path) -> None:
    config = made(tmp_path, "plain", "run")
    setattr(config.protocol, field, value)
    with pytest.raises(ConfigError, match=f"protocol.{field} must be"):
        resolve(config)


def test_the_gradient_angle_of_a_part_is_not_recorded_for_the_whole(tmp_path: Path) -> None:
    config = made(tmp_path, "accumulated", "run")
    config.record.gradient_angle_every = 5
    with pytest.raises(ConfigError, match="of the whole mini-batch"):
        resolve(config)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_shares_make_up_the_whole(count: int, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedContext, "count", count)
    context = DistributedContext(ProtocolConfig(gradient_accumulation_steps=accumulation))
    shares, tested = [], []
    for rank in range(count):
        monkeypatch.setattr(context, "rank", rank)
        shares += [list(range(12))[share] for share in context.micro_batches(12)]
        for stop in (1, 2, 7):
            part, counted = context.evaluation_share(0, stop)
            images = list(range(stop))[part]
            assert images
            tested.append((stop, images[:counted]))
    assert {len(share) for share in shares} == {12 // (count * accumulation)}
    assert sorted(i for share in shares for i in share) == list(range(12))
    for stop in (1, 2, 7):
        assert sorted(i for whole, images in tested if whole == stop for i in images) == list(range(stop))


def test_statistics_that_would_be_of_a_share_are_found() -> None:
    from timm.layers import BatchNormAct2d, EvoNorm2dB0

    assert other_batch_statistics(nn.Sequential(BatchNormAct2d(3))) is None
    assert other_batch_statistics(nn.Sequential(nn.Conv2d(1, 3, 1), EvoNorm2dB0(3))) == "EvoNorm2dB0"


def test_one_process_needs_no_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    config = made(tmp_path, "sharded", "run")
    config.protocol.epochs = 1
    assert train(config).status == "finished"


def test_processes_that_cannot_join_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start them by torchrun, or unset WORLD_SIZE"):
        train(made(tmp_path, "plain", "run"))
    assert main(["sweep", "--conditions", "[SGD]", "--datasets", "[digits]"]) == 2
    assert "each would run the whole sweep: start it without torchrun" in capsys.readouterr().err
