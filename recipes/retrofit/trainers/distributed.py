"""I train on several processes; where does the one line go?

Before you wrap the model: call `feedbackhook.patch(model)`, then `DistributedDataParallel(model)` or
`fully_shard` (FSDP2) on each layer. Layer names and seed determine the random parts of V, so all processes
have the same V without communication. Patching after wrapping works too, but the layers then have the
wrapper's names ("module.conv1" instead of "conv1"), and V is a different draw.

Under FSDP2 weights are sharded. `feedbackhook.measure(patch)`, `patch.feedback(name)` and `patch.watch`
gather them, so all processes must call them. `measure(patch, loss)` raises an error there.

    torchrun --nproc-per-node 2 recipes/retrofit/trainers/distributed.py --strategy ddp
    torchrun --nproc-per-node 2 recipes/retrofit/trainers/distributed.py --strategy fsdp2
    torchrun --nproc-per-node 2 recipes/retrofit/trainers/distributed.py --strategy fsdp2 --smoke true
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import auto_cli
from shared import digits, make_console, summarize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import feedbackhook

Strategy = Literal["ddp", "fsdp2"]


class CNN(nn.Module):
    """A small convolutional network for the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.last(F.relu(self.hidden(x.flatten(1))))


def wrapped(model: CNN, strategy: Strategy, device: torch.device) -> nn.Module:
    """Wrap the model, so that its gradients are averaged over all processes."""
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (model.conv2, model.hidden):  # the other layers are sharded with the root
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    model: nn.Module, data: TensorDataset, epochs: int, batch_size: int, lr: float, device: torch.device
) -> list[float]:
    """Train by SGD with momentum 0.9; return the mean loss over all processes of each step.

    `batch_size` is per process.
    """
    patch = feedbackhook.get_patch(model)
    learned = [] if patch is None else patch.parameters()  # by rules such as "KP"; DDP need not know of them
    optimizer = torch.optim.SGD([*model.parameters(), *learned], lr=lr, momentum=0.9)
    sampler = DistributedSampler(data, drop_last=True)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / dist.get_world_size())
    return losses


def main(
    strategy: Strategy = "ddp",
    feedback: dict[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float = 0.01,
    seed: int = 0,
    smoke: bool = False,
) -> None:
    """Train on all processes that torchrun started, and print in the first.

    Args:
        strategy: `ddp`: each process has all weights; `fsdp2`: each process has a part of each weight.
        feedback: Keyword arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        epochs: Passes over the digits.
        batch_size: Images per process and step.
        lr: Learning rate.
        seed: Seed of the weights and of the order of the images.
        smoke: Train for a few steps to check that it works (seconds).
    """
    if "RANK" not in os.environ:
        raise SystemExit(
            "distributed.py needs torchrun, which tells each process its rank; run: "
            "torchrun --nproc-per-node 2 recipes/retrofit/trainers/distributed.py"
        )
    console = make_console()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    try:
        torch.manual_seed(seed)
        model = CNN().to(device)
        patch = feedbackhook.patch(model, **(feedback or {}))  # the one line
        data = digits()
        if smoke:
            data, epochs = TensorDataset(*data[: 4 * batch_size * dist.get_world_size()]), 1
        losses = train(wrapped(model, strategy, device), data, epochs, batch_size, lr, device)
        summarize(console, patch, losses, show=dist.get_rank() == 0)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
    # Gloo's threads may still hold tensors while the interpreter shuts down, which sometimes aborts the
    # process, with plain torch.distributed too (pytorch/pytorch#179291). All work is done, so exit at once.
    sys.stdout.flush()
    os._exit(0)
