"""One run on one process or on many: what the training loop asks for, whichever it is.

Under torchrun Hugging Face Accelerate finds the processes and their devices, joins them, and wraps the
network in DistributedDataParallel. FSDP2 is torch's own `fully_shard` on every device: Accelerate has it on
accelerators alone, and one code path is one that a machine without a GPU can test. It makes one group of the
whole network, which is right however a network uses its weights: between steps every process keeps a share of
weights, gradients and optimizer state, and forward and backward gather all of it.

A process alone needs no Accelerate, which takes seconds to import.

Letters: B images a mini-batch, N processes, A backwards an update.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from feedbackhook.experiments.config import ConfigError, ProtocolConfig, one_line
from feedbackhook.experiments.models.batch_norm import OfAllProcesses, other_batch_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# Decoding a large data set may take long; a process that dies ends all by torchrun, without a timeout.
_PATIENCE = timedelta(hours=12)


class ToldElsewhere(ConfigError):
    """A configuration's error that another process tells the user."""


def started_processes() -> int:
    """How many processes torchrun (or who else has joined them) has started for one run; 1 where none has."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks(of: str = "RANK") -> bool:
    """Whether this process is the one that speaks to the user: the first of all (RANK), or of those of its
    machine (LOCAL_RANK)."""
    return int(os.environ.get(of, "0")) == 0


def refusal(message: str) -> ConfigError:
    """The error that all processes raise alike, and of which one tells the user."""
    return ConfigError(message) if speaks() else ToldElsewhere(message)


class Processes:
    """A process alone.

    Attributes:
        count: N.
        first: whether this is the one that writes.
        group: that of torch.distributed over all processes; None for one alone.
    """

    count = 1
    first = True
    group: ProcessGroup | None = None

    def __init__(self, protocol: ProtocolConfig) -> None:
        self._bf16, self._accumulation = protocol.precision == "bf16", protocol.gradient_accumulation_steps
        self._model: nn.Module | None = None
        self._network: nn.Module | None = None  # the model, or what wraps it
        self._device = torch.device("cpu")

    def device(self, name: str) -> torch.device:
        """This process's device of the kind that the configuration names."""
        self._device = torch.device(name)
        return self._device

    def told(self, find: Callable[[], T]) -> T:
        """What ``find`` gives in the first process, which alone runs it, told to all; so is a ConfigError."""
        return find()

    def agreed(self) -> AbstractContextManager[None]:
        """A ConfigError that any process raises within is raised in all, at the end."""
        return nullcontext()

    def in_turn(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, in each machine's first process, then in the others (which find what the first
        has downloaded); a ConfigError of any is raised in all."""
        return work()

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Makes the network, patched before if at all, that of all processes, and the optimizer with it."""
        self._model = self._network = model

    def shares(self, size: int) -> list[slice]:
        """This process's images of a mini-batch of ``size``, for each of the A backwards."""
        part = size // (self._accumulation * self.count)
        rank = self._rank()
        starts = [(a * self.count + rank) * part for a in range(self._accumulation)]
        return [slice(start, start + part) for start in starts]

    def portion(self, start: int, stop: int) -> tuple[slice, int]:
        """This process's images of those to be evaluated, and how many of them count.

        It is one image at the least, since every process must run as many forwards as the others.
        """
        size, rank = stop - start, self._rank()
        mine = slice(start + size * rank // self.count, start + size * (rank + 1) // self.count)
        counted = mine.stop - mine.start
        return (mine, counted) if counted else (slice(start, start + 1), 0)

    def seed(self, seed: int, epoch: int) -> None:
        """Begins the random numbers of an epoch's forwards. A process alone goes on with those it has."""

    def autocast(self) -> AbstractContextManager[Any]:
        """A context for forwards: mixed precision where the protocol says so."""
        return (
            torch.autocast(self._device.type, torch.bfloat16, enabled=True) if self._bf16 else nullcontext()
        )

    def forward(self, x: Tensor) -> Tensor:
        """The network's output in float32, with batch statistics over all processes in training."""
        assert self._model is not None
        assert self._network is not None
        with self.autocast():
            output: Tensor = (self._network if self._model.training else self._model)(x)
        return output.float()

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """A context for forward and backward of one of the A parts of a mini-batch; in the ``last``,
        gradients are averaged over the processes."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The backward of the mean loss over a part."""
        (loss if self._accumulation == 1 else loss / self._accumulation).backward()

    def total(self, *values: float) -> list[float]:
        """Each number, summed over all processes."""
        return list(values)

    def states(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The whole states of both, the same for every number of processes. All must ask."""
        return model.state_dict(), optimizer.state_dict()

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        model_state: dict[str, Any],
        optimizer_state: dict[str, Any],
    ) -> None:
        """Loads what :meth:`states` gave, perhaps on another number of processes."""
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)

    def _rank(self) -> int:
        return 0


class ManyProcesses(Processes):
    """One of the processes that torchrun has started."""

    def __init__(self, protocol: ProtocolConfig) -> None:
        super().__init__(protocol)
        from accelerate import Accelerator  # type: ignore[import-untyped]

        # On a machine without a GPU Accelerate would leave each process to itself, were it not told.
        self._accelerator = Accelerator(
            cpu=not _on_gpus(protocol),
            mixed_precision="no",  # autocast is ours, the same as in one process
            gradient_accumulation_steps=protocol.gradient_accumulation_steps,
        )
        if self._accelerator.num_processes != started_processes():
            raise RuntimeError(
                f"torchrun has started {started_processes()} processes, and Accelerate sees "
                f"{self._accelerator.num_processes}: its own settings (ACCELERATE_...) must not say otherwise"
            )
        self.count, self.first = self._accelerator.num_processes, self._accelerator.is_main_process
        self._device = self._accelerator.device
        self.group = torch.distributed.group.WORLD
        self._sharded = protocol.strategy == "fsdp2"
        self._random: list[Tensor] = []

    def device(self, name: str) -> torch.device:
        if torch.device(name).type != self._device.type:
            raise RuntimeError(f"the processes are on {self._device.type}, and the run is to be on {name}")
        return self._device

    def told(self, find: Callable[[], T]) -> T:
        from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = find()
            except ConfigError as error:
                told[1] = error
        found, failure = broadcast_object_list(told)
        self._raise(None if failure is None else 0, failure)
        result: T = found
        return result

    @contextmanager
    def agreed(self) -> Iterator[None]:
        own: ConfigError | None = None
        try:
            yield
        except ConfigError as error:
            own = error
        self._agree(own)

    def in_turn(self, work: Callable[[], T]) -> T:
        results: list[T] = []
        for turn in (True, False):
            with self.agreed():
                if self._accelerator.is_local_main_process is turn:
                    results.append(work())
        return results[0]

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if own := other_batch_statistics(model):
            with self.agreed():
                raise ConfigError(
                    f"{own} takes statistics of a mini-batch in a way of its own, and each of {self.count} "
                    "processes would take those of its share: run it in one process"
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
            group["params"] = [sharded[p] for p in group["params"]]

    def seed(self, seed: int, epoch: int) -> None:
        key = np.random.SeedSequence([seed, epoch, self._rank()]).generate_state(1, np.uint64)
        with self._kept_random():
            torch.manual_seed(int(key[0]) >> 1)
            self._random = self._random_states()

    def forward(self, x: Tensor) -> Tensor:
        assert self._model is not None
        if not self._model.training:
            return super().forward(x)
        # Dropout draws other numbers in each process, and all go on with the same ones for augmentation.
        with self._kept_random():
            self._set_random(self._random)
            with OfAllProcesses(self.count):
                output = super().forward(x)
            self._random = self._random_states()
        return output

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        if self._sharded:
            self._network.set_requires_gradient_sync(last)  # type: ignore[union-attr, operator]
            yield
            return
        with nullcontext() if last else self._accelerator.no_sync(self._network):
            yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def total(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        totals: list[float] = self._accelerator.reduce(sums, "sum").tolist()
        return totals

    def states(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        gathered: dict[int, Tensor] = {}  # once where weights are tied
        whole = {name: _whole(value, gathered) for name, value in model.state_dict().items()}
        state = optimizer.state_dict()
        rows = {
            key: {name: _whole(value, gathered) for name, value in row.items()}
            for key, row in state["state"].items()
        }
        return whole, {**state, "state": rows}

    def restore(
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
        super().restore(model, optimizer, model_state, {**optimizer_state, "state": rows})

    def close(self, well: bool) -> None:
        """The processes wait for one another where all goes well."""
        if well:
            self._accelerator.wait_for_everyone()

    def _rank(self) -> int:
        rank: int = self._accelerator.process_index
        return rank

    def _agree(self, own: ConfigError | None) -> None:
        from accelerate.utils import gather_object

        errors = gather_object([own])
        failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
        self._raise(failed, None if failed is None else errors[failed])

    def _raise(self, rank: int | None, error: ConfigError | None) -> None:
        """Raises the error of a process in all of them; the first tells it."""
        if rank is None or error is None:
            return
        where = f" (in process {rank})" if rank else ""
        raise ConfigError(f"{error}{where}") if self.first else ToldElsewhere(str(error))

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
def started(protocol: ProtocolConfig) -> Iterator[Processes]:
    """The processes of a run: those that torchrun has started, or this one alone.

    Afterwards the process group is gone, unless it was there before, and Accelerate knows what it knew.

    Raises:
        ConfigError: the device is not one that several processes can share out.
    """
    if started_processes() == 1:
        yield Processes(protocol)
        return
    if protocol.device not in ("auto", "cpu", "cuda"):
        message = (
            f"protocol.device {protocol.device!r} is one device, and torchrun has started "
            f"{started_processes()} processes: give cuda, of which each takes its own, or cpu"
        )
        raise refusal(message)
    with _process_group("nccl" if _on_gpus(protocol) else "gloo"), _own_accelerate():
        many = ManyProcesses(protocol)
        well = False
        try:
            yield many
            well = True
        finally:
            many.close(well)


def _on_gpus(protocol: ProtocolConfig) -> bool:
    return protocol.device != "cpu" and torch.cuda.is_available()


@contextmanager
def _process_group(backend: str) -> Iterator[None]:
    """All processes joined in torch.distributed, unless they are already.

    A second group in the same processes, for another run, must not find the first's addresses in torchrun's
    store, for which it would wait until its time is over: each group has a prefix there.
    """
    if torch.distributed.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    except ValueError as error:  # a variable is missing
        raise ConfigError(
            f"WORLD_SIZE says that there are {started_processes()} processes, but not how they join "
            f"({one_line(error)}): start them by torchrun, or unset WORLD_SIZE for a run in one process"
        ) from error
    number = (store.add("feedbackhook/joined", 1) - 1) // count
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore(f"feedbackhook/{number}", store),
        rank=rank,
        world_size=count,
        timeout=_PATIENCE,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _own_accelerate() -> Iterator[None]:
    """Accelerate as if it had not been used, and after the block as it was: its state is the process's, and a
    second Accelerator would have to be like the first."""
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
    """A sharded tensor put together; all else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    key = id(value)
    if key not in gathered:
        gathered[key] = value.full_tensor()
    return gathered[key]


def _like(value: Any, own: Any) -> Any:
    """A tensor sharded as ``own`` is, of whose shape it is; of another shape, whole in each process."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    placements = own.placements if value.shape == own.shape else [Replicate()] * len(own.placements)
    return distribute_tensor(value.to(own.device), own.device_mesh, placements)
