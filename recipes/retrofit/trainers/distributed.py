"""I train on several processes; where does the one line go?

Before the model is wrapped: `feedbackhook.patch(model)`, then `DistributedDataParallel(model)` or, layer by
layer, `fully_shard` (FSDP2). The names of the layers are then those of the plain model, and names and seed
decide the random parts of V, so that every process has the same V without any communication. Patching after
wrapping works too, with the wrapper's names: V is then that of "module.conv1" instead of "conv1", another
draw.

Under FSDP2 weights are sharded: `feedbackhook.measure(patch)`, `patch.feedback(name)` and `patch.watch`
gather them, so that every process must call them; `measure(patch, loss)` is refused there.

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
from rich.console import Console
from sklearn.datasets import load_digits
from summary import summarise
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import feedbackhook

Strategy = Literal["ddp", "fsdp2"]


class CNN(nn.Module):
    """A small convolutional network for digits."""

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
    """The model as the strategy wants it: its gradients are means over all processes."""
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (model.conv2, model.hidden):  # the others make the root's group
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    model: nn.Module, data: TensorDataset, epochs: int, batch_size: int, lr: float, device: torch.device
) -> list[float]:
    """SGD with momentum 0.9, `batch_size` images a process and step; returns the loss of each step, over all
    processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
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


def digits() -> TensorDataset:
    """scikit-learn's digits: images `[N, 1, 8, 8]` from 0 to 1, and labels `[N]`."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return TensorDataset(images, torch.from_numpy(found.target).long())


def main(
    strategy: Strategy = "ddp",
    feedback: dict[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float = 0.01,
    seed: int = 0,
    smoke: bool = False,
) -> None:
    """Train on all processes that torchrun has started, print in the first.

    Args:
        strategy: `ddp`, each process has all weights; `fsdp2`, each has a part of each.
        feedback: the arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        epochs: passes over the digits.
        batch_size: images a process and step.
        lr: learning rate.
        seed: of the weights and of the order of the images.
        smoke: a few steps, to see that it works: seconds.
    """
    if "RANK" not in os.environ:
        raise SystemExit(
            "distributed.py is started by torchrun, which tells each process its rank: "
            "torchrun --nproc-per-node 2 recipes/retrofit/trainers/distributed.py"
        )
    console = Console(soft_wrap=True, width=200)  # no name in the table is cut
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
        summarise(console, patch, losses, show=dist.get_rank() == 0)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
    # Gloo's threads may still hold a collective's tensors while the interpreter is torn down, and then the
    # process aborts at times, with plain torch.distributed too (pytorch/pytorch#179291). Nothing is left.
    sys.stdout.flush()
    os._exit(0)
