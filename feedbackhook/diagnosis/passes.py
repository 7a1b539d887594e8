"""Run batches through a patched model without leaving a trace, and keep what the checks need."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feedbackhook.core.audit import has_compiled_code
from feedbackhook.core.layer import Layer, Patched
from feedbackhook.core.state import PatchHandle, PatchState

Batch = Any
"""A pair (input, target), or a mapping of keyword arguments of the model."""

Loss = Callable[[Any, Any], Tensor]
"""`loss(model(input), target)`; for a mapping, `loss(model(**batch), batch)`."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Enable gradients within this context; afterwards, also after an error, restore the model's buffers and
    training modes, and the random states of torch, numpy and Python."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    training = [(module, module.training) for module in model.modules()]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for module, mode in training:
            module.training = mode
        for module, name, buffer, value in buffers:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # through `data`, so that a graph that saved the buffer stays valid


def listed(batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """Return the batches as a list, leaving the random state as it was.

    Raises:
        ValueError: there is none.
        TypeError: one is neither a pair nor a mapping.
    """
    with preserved(model):
        found = list(batches)
    if not found:
        raise ValueError("batches is empty; pass at least one pair (input, target)")
    for batch in found:
        if not isinstance(batch, Mapping) and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(
                "a batch must be a pair (input, target), or a mapping of keyword arguments of the model, not "
                f"{_kind(batch)}; a single batch must be in a list"
            )
    return found


def loss_of(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    state: PatchState | None = None,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Return the loss of one batch. Direct rules also get integer targets, as by `Patch.targets`.

    Args:
        model: the model.
        batch: a pair or a mapping.
        loss: the loss.
        state: of the model's patch.
        forward: called instead of the model.

    Raises:
        ValueError: it is not a scalar.
    """
    run = model if forward is None else forward
    if isinstance(batch, Mapping):
        value = loss(run(**batch), batch)
    else:
        x, target = batch
        if state is not None and state.projections and _are_classes(target):
            state.targets = target.detach()
        output = run(**x) if isinstance(x, Mapping) else run(*x) if _is_several(x) else run(x)
        value = loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss must return a tensor with one element, not {_kind(value)}")
    return value


def named_gradients(loss: Tensor, parameters: Iterable[Tensor], keep: bool = False) -> dict[int, Tensor]:
    """Return the gradient of each parameter that the loss reaches, by the parameter's id.

    Args:
        loss: a scalar with a graph.
        parameters: those that require no gradient are left out.
        keep: whether to keep the graph.

    Raises:
        ValueError: the loss depends on no parameter.
        RuntimeError: compiled code has computed it.
    """
    if has_compiled_code(loss):
        raise RuntimeError("compiled code shows no error signals; run the uncompiled model")
    wanted = list({id(p): p for p in parameters if p.requires_grad}.values())
    if loss.grad_fn is None or not wanted:
        raise ValueError(
            "the loss depends on no parameter that requires a gradient: was it made without gradients, "
            "detached, or are all patched layers frozen?"
        )
    found = torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True)
    return {id(p): g.detach() for p, g in zip(wanted, found, strict=True) if g is not None}


@dataclass
class Scales:
    """The sizes of what meets in a layer's gradient: squared norms, summed over a layer's calls.

    Args:
        inputs: of the layer's inputs.
        outputs: of its outputs.
        errors: of the exact error signals at its output.
        unit: the rounding unit of the coarsest format among weight, input and output.
    """

    inputs: float = 0.0
    outputs: float = 0.0
    errors: float = 0.0
    unit: float = 0.0


@dataclass
class Observed:
    """What a forward and an exact backward showed of each layer."""

    of: dict[Patched, Scales] = field(default_factory=dict)

    def call(self, layer: Patched, input: Tensor, output: Tensor) -> None:
        """Note a call of the layer's function."""
        scales = self.of.setdefault(layer, Scales())
        scales.inputs += _square(input)
        scales.outputs += _square(output)
        tensors = [input, output, *layer.parameters()]
        units = [torch.finfo(t.dtype).eps / 2 for t in tensors if t.is_floating_point()]
        scales.unit = max(scales.unit, *units)

    def error(self, layer: Patched, signal: Tensor) -> None:
        """Note an exact error signal at the layer's output."""
        self.of.setdefault(layer, Scales()).errors += _square(signal)


@contextmanager
def observe(state: PatchState) -> Iterator[Observed]:
    """Observe the calls within this context, and the error signals of its exact backwards.

    Probes are put on all layers, so use it inside `PatchState.undisturbed`.
    """
    observed = Observed()

    def probe_of(layer: Patched) -> Callable[[Tensor | None, Tensor], None]:
        def probe(grad_input: Tensor | None, grad_output: Tensor) -> None:
            if state.exact:
                observed.error(layer, grad_output)

        return probe

    with ExitStack() as handles:
        handles.enter_context(state.listen_to_calls(observed.call))
        for layer in state.layers:
            handles.enter_context(layer.add_probe(probe_of(layer)))
        yield observed


def trainable(each: Patched) -> list[Tensor]:
    """Return the parameters of a patched place that require a gradient."""
    return [p for p in each.parameters() if p.requires_grad]


def check_whole(patch: PatchHandle) -> None:
    """Raise RuntimeError if the model is sharded, whose gradients these passes would not see."""
    if any(hasattr(p, "full_tensor") for each in patch.state.patched for p in each.parameters()):
        raise RuntimeError("parameters are sharded, and only backward() puts their gradients together")


def taps(layer: Patched) -> int:
    """Return the number of positions of the input that meet in one position of the output."""
    shape = layer.info.shape if isinstance(layer, Layer) else ()
    return int(np.prod(shape[2:], dtype=int)) if layer.info.kind.startswith("Conv") else 1


def _square(tensor: Tensor) -> float:
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=wide)) ** 2


def _are_classes(target: Any) -> bool:
    return isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex()


def _is_several(x: Any) -> bool:
    return isinstance(x, (tuple, list))


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
