"""What learning with direct feedback must give, by a mechanism that shares nothing with the library.

A model without any patch and `matrices = {name: B}` go in, B of the shape (D, K). A full backward hook on
each named layer or module returns B times the error at the output, which a pass of its own computes first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import feedbackhook
from support.oracle import Gradients, Step, call, probe, read_gradients

Matrices = Mapping[str, Tensor]
Signal = Callable[[Tensor], Tensor]
Send = Callable[[Tensor, Tensor, torch.Size], Tensor]


def per_sample(b: Tensor, signal: Tensor, shape: torch.Size) -> Tensor:
    """From all of the error of a sample to all of its features."""
    rows = [(b @ row.reshape(-1)).reshape(shape[1:]) for row in signal]
    return torch.stack(rows)


def per_token(b: Tensor, signal: Tensor, shape: torch.Size) -> Tensor:
    """From the error of a token to its features."""
    return torch.einsum("dk,ntk->ntd", b, signal).reshape(shape)


@contextmanager
def backward_hooks(model: nn.Module, sent: Callable[[str, torch.Size], Tensor], names) -> Iterator[None]:
    """Let the gradient of each named module's input be what `sent` returns for its name and shape."""

    def hook_of(name: str):
        def hook(module: nn.Module, grad_input: tuple, grad_output: tuple) -> tuple | None:
            if grad_input[0] is None:
                return None
            return (sent(name, grad_input[0].shape), *grad_input[1:])

        return hook

    handles = [model.get_submodule(name).register_full_backward_hook(hook_of(name)) for name in names]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        for handle in handles:
            handle.remove()


def by_hooks(
    model: nn.Module,
    matrices: Matrices,
    x: Tensor,
    step: Step = call,
    *,
    signal: Signal = lambda e: e,
    send: Send = per_sample,
    loss: Callable[[Tensor], Tensor] = probe,
    input_requires_grad: bool = True,
) -> Gradients:
    """The gradients of `loss(step(model, x))` on a copy of `model`, which has no patch."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(input_requires_grad)
    errors: list[Tensor] = []

    def sent(name: str, shape: torch.Size) -> Tensor:
        return send(matrices[name], signal(errors[0]), shape)

    with backward_hooks(model, sent, matrices):
        output = step(model, x)
        errors += torch.autograd.grad(loss(output), output, retain_graph=True)
        loss(output).backward()
    return read_gradients(model, x, output)


def matrices_of(patch: feedbackhook.Patch) -> dict[str, Tensor]:
    """B by name, of all that received an error signal."""
    return {row.name: patch.projection(row.name) for row in patch.layers if row.rerouted}
