"""What the training loop asks of the processes that train a run; here for a single process.

:mod:`feedbackhook.experiments.training.torchrun` does the same for several. A single process needs no
Accelerate, which takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from feedbackhook.experiments.config import ProtocolConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class DistributedContext:
    """A single process.

    Attributes:
        count: number of processes.
        rank: number of this process, from 0.
        is_main: whether this process writes the run folder and reports to the user.
        group: the process group of torch.distributed; None for a single process.
        accumulation_steps: number of backward passes per optimizer step.
    """

    count = 1
    rank = 0
    is_main = True
    group: ProcessGroup | None = None

    def __init__(self, protocol: ProtocolConfig) -> None:
        self.accumulation_steps = protocol.gradient_accumulation_steps
        self._bf16 = protocol.precision == "bf16"
        self._model: nn.Module | None = None
        self._network: nn.Module | None = None  # the model, or DistributedDataParallel around it
        self._device = torch.device("cpu")

    def device(self, name: str) -> torch.device:
        """Return this process's device of the kind that the configuration names."""
        self._device = torch.device(name)
        return self._device

    def broadcast_from_main(self, find: Callable[[], T]) -> T:
        """Call `find` in the main process and return its result in all; a `ConfigError` is raised in all."""
        return find()

    def raise_together(self) -> AbstractContextManager[None]:
        """Raise in all processes, at the end of the block, a `ConfigError` that any of them raised in it."""
        return nullcontext()

    def local_main_first(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process of each machine, then in the others, which find what it has
        downloaded; a `ConfigError` of any process is raised in all."""
        return work()

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Distribute the network and the optimizer over all processes.

        If the network is to be patched, patch it first.
        """
        self._model = self._network = model

    def micro_batches(self, size: int) -> list[slice]:
        """Return this process's images of a mini-batch of `size`, for each backward pass."""
        part = size // (self.accumulation_steps * self.count)
        starts = [(step * self.count + self.rank) * part for step in range(self.accumulation_steps)]
        return [slice(start, start + part) for start in starts]

    def evaluation_share(self, start: int, stop: int) -> tuple[slice, int]:
        """Return this process's images of those to evaluate, and how many of them count.

        It is at least one image, since every process must run as many forward passes as the others.
        """
        size = stop - start
        share = slice(start + size * self.rank // self.count, start + size * (self.rank + 1) // self.count)
        counted = share.stop - share.start
        return (share, counted) if counted else (slice(start, start + 1), 0)

    def seed_forwards(self, seed: int, epoch: int) -> None:
        """Seed the random numbers of an epoch's forward passes, such as dropout's, for each process.

        A single process continues with the global generator.
        """

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: mixed precision if the protocol asks for it."""
        return (
            torch.autocast(self._device.type, torch.bfloat16, enabled=True) if self._bf16 else nullcontext()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output in float32; in training, batch statistics are over all processes."""
        assert self._model is not None
        assert self._network is not None
        with self.autocast():
            output: Tensor = (self._network if self._model.training else self._model)(x)
        return output.float()

    def forward_alone(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return a network's output in training as `forward` does, before it is distributed."""
        with self.autocast():
            output: Tensor = model(x)
        return output.float()

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of the forward and backward pass of one micro-batch.

        Gradients are averaged over the processes in the `last` one of a mini-batch.
        """
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of the mean loss over a micro-batch."""
        (loss if self.accumulation_steps == 1 else loss / self.accumulation_steps).backward()

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return each number summed over all processes."""
        return list(values)

    def state_dicts(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the whole states of both, the same for any number of processes. All processes must call."""
        return model.state_dict(), optimizer.state_dict()

    def load_state_dicts(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        model_state: dict[str, Any],
        optimizer_state: dict[str, Any],
    ) -> None:
        """Load the result of :meth:`state_dicts`, perhaps of another number of processes."""
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
