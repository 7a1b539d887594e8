"""The recipe for several processes.

The weights after a few steps are those of a plain loop with the same patch on the same batches, whose
gradients are the oracle's and not backprop's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from support.bounds import HANG
from support.paths import python_path
from support.recipes import RECIPES
from support.trainer_rank import STRATEGIES, WORLD
from support.trainers import RULES, assert_told, load_trainer


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_train_as_a_plain_loop_does():
    out = torchrun("-m", "support.trainer_rank")
    passed = [line for line in out.splitlines() if line.startswith("passed ")]
    assert passed == [f"passed {strategy} {rule}" for strategy in STRATEGIES for rule in RULES]
    told = out.split("the recipe itself:")
    assert len(told) == 1 + len(STRATEGIES)
    for table in told[1:]:
        assert_told(table, ["conv1", "conv2", "hidden", "last"], rerouted=4)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun_runs_the_recipe(strategy):
    done = torchrun(
        RECIPES / "retrofit" / "trainers" / "distributed.py", "--strategy", strategy, "--smoke", "true"
    )
    assert_told(done, ["conv1", "conv2", "hidden", "last"], rerouted=4)


def torchrun(*command: Path | str) -> str:
    """What two processes of the script print."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(
        [*start, *map(str, command)], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_torchrun_the_recipe_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        load_trainer("distributed").main(smoke=True)
