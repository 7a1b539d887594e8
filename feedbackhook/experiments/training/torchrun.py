"""A run in several processes, started by torchrun.

Hugging Face Accelerate finds the processes and their devices, joins them, and wraps the network in
DistributedDataParallel. FSDP2 is torch's `fully_shard` on every device: Accelerate offers it on accelerators
only, and a single code path can be tested without a GPU. All weights are one group, which is right however a
network uses its weights: between steps each process keeps a shard of weights, gradients and optimizer state,
and the forward and backward passes gather all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from feedbackhook.experiments.config import ConfigError, ProtocolConfig, one_line
from feedbackhook.experiments.models.batch_norm import OfAllProcesses, other_batch_statistics
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.processes import ReportedByMain, shared_error, world_size

T = TypeVar("T")

# Decoding a large dataset may take hours. If a process dies, torchrun ends the others without this timeout.
_TIMEOUT = timedelta(hours=12)


class TorchrunContext(DistributedContext):
    """One of the processes that torchrun has started."""

    def __init__(self, protocol: ProtocolConfig) -> None:
        super().__init__(protocol)
        from accelerate import Accelerator  # type: ignore[import-untyped]

        # Without `cpu`, Accelerate would not join the processes of a machine without a GPU.
        self._accelerator = Accelerator(
            cpu=not _on_gpus(protocol),
            mixed_precision="no",  # `autocast` does it, as in a single process
            gradient_accumulation_steps=protocol.gradient_accumulation_steps,
        )
        if self._accelerator.num_processes != world_size():
            raise RuntimeError(
                f"torchrun has started {world_size()} processes, but Accelerate sees "
                f"{self._accelerator.num_processes}: unset the environment variables ACCELERATE_..."
            )
        self.count, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        self.is_main = self._accelerator.is_main_process
        self._device = self._accelerator.device
        self.group = torch.distributed.group.WORLD
        self._sharded = protocol.strategy == "fsdp2"
        self._random: list[Tensor] = []

    def device(self, name: str) -> torch.device:
        if torch.device(name).type != self._device.type:
            raise RuntimeError(f"the processes are on {self._device.type}, but protocol.device is {name}")
        return self._device

    def broadcast_from_main(self, find: Callable[[], T]) -> T:
        from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = find()
            except ConfigError as error:
                message[1] = _without_frames(error)
        found, failure = broadcast_object_list(message)
        self._raise(None if failure is None else 0, failure)
        result: T = found
        return result

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        own: ConfigError | None = None
        try:
            yield
        except ConfigError as error:
            own = _without_frames(error)
        self._raise_any(own)

    def local_main_first(self, work: Callable[[], T]) -> T:
        results: list[T] = []
        for turn in (True, False):
            with self.raise_together():
                if self._accelerator.is_local_main_process is turn:
                    results.append(work())
        return results[0]

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if own := other_batch_statistics(model):
            with self.raise_together():
                raise ConfigError(
                    f"{own} computes its own batch statistics, so each of {self.count} processes would use "
                    "those of its share of the mini-batch: train this network in one process"
                )
        self._model = self._network = model
        if not self._sharded:
            self._network = self._accelerator.prepare_model(model)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        before = list(model.parameters())
        model.to(memory_format=torch.contiguous_format)
        fully_shard(
            model, mesh=init_device_mesh(self._device.type, (self.count,)), reshard_after_forward=True
        )
        sharded = dict(zip(before, model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [sharded.get(p, p) for p in group["params"]]

    def seed_forwards(self, seed: int, epoch: int) -> None:
        key = np.random.SeedSequence([seed, epoch, self.rank]).generate_state(1, np.uint64)
        with self._kept_random():
            torch.manual_seed(int(key[0]) >> 1)
            self._random = self._random_states()

    def forward(self, x: Tensor) -> Tensor:
        assert self._model is not None
        if not self._model.training:
            return super().forward(x)
        # Dropout draws different numbers in each process; augmentation draws the same ones in all.
        with self._kept_random():
            self._set_random(self._random)
            with OfAllProcesses(self.count):
                output = super().forward(x)
            self._random = self._random_states()
        return output

    def forward_alone(self, model: nn.Module, x: Tensor) -> Tensor:
        with OfAllProcesses(self.count):
            return super().forward_alone(model, x)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self._sharded:
            self._network.set_requires_gradient_sync(last)  # type: ignore[union-attr, operator]
            yield
            return
        with nullcontext() if last else self._accelerator.no_sync(self._network):
            yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def all_reduce_sum(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        totals: list[float] = self._accelerator.reduce(sums, "sum").tolist()
        return totals

    def state_dicts(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # torch.distributed.checkpoint.state_dict would not do: it takes a step of an optimizer that has no
        # state yet, which a patch and its watch count, and it names parameters, so that the checkpoint of a
        # single process would have another form.
        gathered: dict[int, Tensor] = {}  # tied weights are gathered once
        whole = {name: _whole(value, gathered) for name, value in model.state_dict().items()}
        state = optimizer.state_dict()
        rows = {
            key: {name: _whole(value, gathered) for name, value in row.items()}
            for key, row in state["state"].items()
        }
        return whole, {**state, "state": rows}

    def load_state_dicts(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        model_state: dict[str, Any],
        optimizer_state: dict[str, Any],
    ) -> None:
        own = model.state_dict()
        model_state = {
            name: _like(value, own[name]) if name in own else value for name, value in model_state.items()
        }
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        rows = {
            key: {name: _like(value, parameters[key]) for name, value in row.items()}
            for key, row in optimizer_state["state"].items()
        }
        super().load_state_dicts(model, optimizer, model_state, {**optimizer_state, "state": rows})

    def wait(self) -> None:
        """Wait until every process has come here."""
        self._accelerator.wait_for_everyone()

    def _raise_any(self, own: ConfigError | None) -> None:
        from accelerate.utils import gather_object

        errors = gather_object([own])
        failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
        self._raise(failed, None if failed is None else errors[failed])

    def _raise(self, rank: int | None, error: ConfigError | None) -> None:
        """Raise the error of one process in all of them."""
        if rank is None or error is None:
            return
        where = f" (in process {rank})" if rank else ""
        raise ConfigError(f"{error}{where}") if self.is_main else ReportedByMain(str(error))

    def _random_states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)

    @contextmanager
    def _kept_random(self) -> Iterator[None]:
        before = self._random_states()
        try:
            yield
        finally:
            self._set_random(before)


@contextmanager
def join_processes(protocol: ProtocolConfig) -> Iterator[DistributedContext]:
    """Join the processes that torchrun has started, if any, to train one run in the block.

    After the block there is no process group, unless there was one before, and Accelerate's state is as it
    was.

    Raises:
        ConfigError: each process needs its own device, and `protocol.device` is a single one.
    """
    if world_size() == 1:
        yield DistributedContext(protocol)
        return
    if protocol.device not in ("auto", "cpu", "cuda"):
        message = (
            f"protocol.device {protocol.device!r} is one device, and torchrun has started "
            f"{world_size()} processes: use cuda, so that each process takes its own GPU, or cpu"
        )
        raise shared_error(message)
    with _process_group("nccl" if _on_gpus(protocol) else "gloo"), _own_accelerate():
        context = TorchrunContext(protocol)
        yield context
        context.wait()  # not after an error, which some processes may not have


def _without_frames(error: ConfigError) -> ConfigError:
    """Return the error without its traceback, whose frames would hold the error itself in a cycle.

    The frames also hold the process group. If its threads are still running when the interpreter exits, the
    process may abort instead of returning its exit status.
    """
    return error.with_traceback(None)


def _on_gpus(protocol: ProtocolConfig) -> bool:
    return protocol.device != "cpu" and torch.cuda.is_available()


@contextmanager
def _process_group(backend: str) -> Iterator[None]:
    """Join all processes in torch.distributed, unless they are joined already.

    Each group has its own prefix in torchrun's store. Otherwise a second group in the same processes, for
    another run, would find the addresses of the first and wait for them until the timeout.
    """
    if torch.distributed.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(rendezvous("env://", timeout=_TIMEOUT))
    except ValueError as error:  # a variable is missing
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but the variables to join these processes are missing "
            f"({one_line(error)}): start them by torchrun, or unset WORLD_SIZE to train in one process"
        ) from error
    number = (store.add("feedbackhook/joined", 1) - 1) // count
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore(f"feedbackhook/{number}", store),
        rank=rank,
        world_size=count,
        timeout=_TIMEOUT,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _own_accelerate() -> Iterator[None]:
    """Give the block a fresh state of Accelerate, and restore the caller's afterwards.

    The state is shared by the whole process, and a second `Accelerator` must be configured like the first.
    """
    from accelerate.state import (  # type: ignore[import-untyped]
        AcceleratorState,
        GradientState,
        PartialState,
    )

    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            state.clear()
            state.update(old)


def _whole(value: Any, gathered: dict[int, Tensor]) -> Any:
    """Gather a sharded tensor; return anything else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    key = id(value)
    if key not in gathered:
        gathered[key] = value.full_tensor()
    return gathered[key]


def _like(value: Any, own: Any) -> Any:
    """Shard a tensor as `own` is sharded if it has the same shape, and replicate it otherwise."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    placements = own.placements if value.shape == own.shape else [Replicate()] * len(own.placements)
    return distribute_tensor(value.to(own.device), own.device_mesh, placements)
