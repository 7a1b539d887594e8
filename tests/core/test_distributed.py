"""DistributedDataParallel and fully_shard on two gloo processes; what is compared stands in the worker."""

import os
import subprocess
import sys

import pytest
import torch
from support import bounds
from support.paths import python_path

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"
)

JOBS = {
    "ddp": [
        *(f"train-{rule}-{order}" for rule in ("sign", "brSF") for order in ("before", "inner", "after")),
        "lent-brSF-before",
        "watch-brSF-before",
        "watch-sign-after",
        "static-sign-before",
        "checkpoint-brSF-before",
    ],
    "ddp, direct": [
        *(f"direct-DFA-{order}" for order in ("before", "inner", "after")),
        "direct-shared-before",
        *(f"direct-sites-{order}" for order in ("before", "after")),
    ],
    "fsdp, direct": ["direct-DFA-before", "direct-DFA-after", "direct-sites-before", "direct-sites-after"],
    "fsdp": [
        *(f"train-{rule}-{order}" for rule in ("sign", "brSF") for order in ("before", "after")),
        "watch-brSF-before",
        "watch-sign-after",
        "checkpoint-sign-before",
        "checkpoint-brSF-after",
    ],
}


@pytest.mark.parametrize(
    "case", [pytest.param(job, marks=[pytest.mark.slow] if "direct" in job else []) for job in JOBS]
)
def test_two_processes_equal_one(case, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "support.distributed_worker", case.split(",")[0], str(tmp_path), *JOBS[case]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=bounds.HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert passed == JOBS[case]
