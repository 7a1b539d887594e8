"""One rank of tests/experiments/training/test_many_processes.py: `torchrun processes_worker.py FOLDER`.

FOLDER/jobs.pickle holds the runs to train, one after the other; how each ended in this rank is left in
FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

from feedbackhook.experiments.config import ConfigError, ProtocolConfig
from feedbackhook.experiments.models.batch_norm import OfAllProcesses
from feedbackhook.experiments.training.run import train
from feedbackhook.experiments.training.torchrun import TorchrunContext, join_processes
from support.job import Job, precisely, stopped_before


def first_share(context: TorchrunContext, size: int) -> list[slice]:
    part = size // (context.accumulation_steps * context.count)
    return [slice(a * part, (a + 1) * part) for a in range(context.accumulation_steps)]


def ended(job: Job) -> list[str]:
    with pytest.MonkeyPatch.context() as patched, stopped_before(job.stop), precisely(job.config):
        if job.wrong_shares:
            patched.setattr(TorchrunContext, "micro_batches", first_share)
        try:
            result = train(job.config, resume=job.resume)
        except (ConfigError, KeyboardInterrupt) as error:
            return [type(error).__name__, str(error)]
    return [result.status, str(result.reason)]


def normalized(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics."""
    x = x.clone().requires_grad_()
    output = norm(x)
    (output * weights).sum().backward()
    assert x.grad is not None
    gradients = {f"d {name}": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "d x": x.grad, **gradients, **dict(norm.named_buffers())}


def check_batch_norm() -> None:
    """Shares of a mini-batch are normalized as the whole is, by PyTorch, in one process: in float64."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 3), (8, 3, 5), (8, 3, 4, 5)):
        x, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        kind = (nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) == 4]
        for options in ({}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}):
            want = normalized(kind(3, **options).double(), x, weights)
            with OfAllProcesses(world):
                mine = [part.chunk(world)[rank] for part in (x, weights)]
                got = normalized(kind(3, **options).double(), *mine)
            local = normalized(kind(3, **options).double(), *mine)
            assert got.keys() == want.keys()
            for name, value in want.items():
                if name.startswith("d ") and name != "d x":
                    torch.distributed.all_reduce(got[name])
                if name in ("output", "d x"):
                    value = value.chunk(world)[rank]
                    assert not torch.allclose(local[name], value, rtol=1e-3), "the share alone would do"
                torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


def main(folder: Path) -> None:
    with join_processes(ProtocolConfig(device="cpu")):
        check_batch_norm()
    outcomes = {}
    for name, job in pickle.loads((folder / "jobs.pickle").read_bytes()).items():
        PartialState._shared_state["user's"] = name  # as if the user had an Accelerator
        outcomes[name] = ended(job)
        assert PartialState._shared_state == {"user's": name}, "Accelerate's state is not the user's"
        assert not torch.distributed.is_initialized(), f"{name} has left a process group"
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Gloo's threads may outlive the interpreter's teardown and abort it, with plain torch.distributed too
    # (pytorch/pytorch#179291). Nothing is left to be done.
    sys.stdout.flush()
    os._exit(0)
