"""One rank of the two-process tests of feedback that learns: `torchrun learning_worker.py`.

Every rank holds half of a batch, and what is learned must be that of one process on the whole batch. A failed
comparison ends the process with an error; rank 0 prints what has passed.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import feedbackhook
from support import bounds
from support.problems import draw, redrawn

STEPS = 3
RULES = {"KP": {}, "PFA": {"expansion": 3}, "information": {}, "WM": {"rate": 0.1, "batch": 8}, "DKP": {}}


def network() -> nn.Sequential:
    return redrawn(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 3)
        )
    )


def trained(mode: str, wrap: str | None, accumulate: bool = False) -> dict[str, Tensor]:
    """Train on the whole batch, or on this rank's half of it, and return V or B of each layer."""
    model = network()
    patch = feedbackhook.patch(model, mode, **RULES[mode])
    shard = slice(None) if wrap is None else slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    x, y = draw(4, 2, 5, 5)[shard], draw(4, 3, seed=1)[shard]
    if patch.awaits_forward:
        model(x)
    run: nn.Module = model
    if wrap == "ddp":
        run = DistributedDataParallel(model)
    elif wrap == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    tensors = [*model.parameters(), *patch.parameters()]
    optimizer = torch.optim.SGD(tensors, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if accumulate and wrap == "ddp":
            with run.no_sync():
                (run(x) - y).square().mean().backward()
        elif accumulate:
            (run(x) - y).square().mean().backward()
        (run(x) - y).square().mean().backward()
        if wrap == "alone":
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            patch.average_gradients()
        optimizer.step()
    if mode == "DKP":
        return {name: p.detach().clone() for name, p in patch.named_parameters()}
    return {row.name: patch.feedback(row.name) for row in patch.layers}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for mode in RULES:
        for accumulate in (False, True):
            want = trained(mode, None, accumulate)
            for wrap in ("ddp", "fsdp", "alone"):
                got = trained(mode, wrap, accumulate)
                for name, v in want.items():
                    off = ((got[name] - v).norm() / v.norm()).item()
                    assert off <= bounds.HALF_OF_FLOAT64, (mode, wrap, accumulate, name, off)
                if dist.get_rank() == 0:
                    print("passed", mode, wrap, accumulate, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main()
