"""Training by compiled code: `protocol.compile`.

The network is compiled in place, with its patch, so its parameters keep their names. Only steps of training
run the compiled code. Steps whose error signals are recorded run the network as it is, since compiled code
shows none, and so do evaluations and checks.

Each batch size has its own code, made without symbolic sizes. So the code of a step does not depend on the
steps before it, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackhook import ExactGradientError
from feedbackhook.core.torch_internals import compile_in_place
from feedbackhook.diagnosis.passes import preserved
from feedbackhook.experiments.config import ConfigError
from feedbackhook.experiments.training.state import TrainingState


def compile_network(state: TrainingState) -> None:
    """Compile the network of a run that asks for it, before it is distributed; otherwise do nothing.

    What compiled code does with the weights cannot be seen, so a forward and a backward of the uncompiled
    network are audited first. Then the code is made, by a forward and a backward that change nothing either.

    Raises:
        ConfigError: a weight would keep exact backprop; there is no compiler, or it cannot make one graph
            of the network.
    """
    mode = state.config.protocol.compile
    if not mode:
        return
    with state.context.raise_together():
        _check_compiler(state.device)
    with state.context.raise_together(), _as_it_was(state):
        _audit(state)
        compile_in_place(state.model, mode=None if mode is True else mode, fullgraph=True, dynamic=False)
        try:
            _gradients(state, _loss(state))
        except ExactGradientError as error:
            raise ConfigError(str(error)) from error
        except RuntimeError as error:
            raise ConfigError(
                f"protocol.compile cannot compile {state.config.model.name} as one graph: {_reason(error)}. "
                "Set it to false"
            ) from error


def uncompiled(state: TrainingState) -> AbstractContextManager[Any]:
    """Return the context of what the network as it is computes, instead of its compiled code."""
    return torch.compiler.set_stance("force_eager") if state.config.protocol.compile else nullcontext()


def average_learned(state: TrainingState) -> None:
    """Average over the processes the gradients of what the feedback learns, after backwards of compiled code,
    which does not tell the patch how the network is distributed."""
    if (
        state.config.protocol.compile
        and state.patch is not None
        and state.learned
        and state.context.count > 1
    ):
        state.patch.average_gradients(state.context.group)


def _check_compiler(device: torch.device) -> None:
    """Check that torch.compile works here, with what it takes: a C++ compiler, or Triton."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise ConfigError(
            f"protocol.compile needs torch.compile, which does not work on this machine: {_reason(error)}. "
            "Install what it lacks, or set protocol.compile to false"
        ) from error


def _audit(state: TrainingState) -> None:
    """Check that no error signal goes through a patched weight, in the first mini-batch."""
    if state.patch is None:
        return
    try:
        with state.patch.state.undisturbed():
            loss = _loss(state)
            found = [finding for finding in state.patch.audit(loss) if finding.patched]
            _gradients(state, loss)
            depths = [each.depth for each in state.patch.state.patched]
    except ExactGradientError as error:
        raise ConfigError(str(error)) from error
    for each, depth in zip(state.patch.state.patched, depths, strict=True):
        each.depth = depth  # which compiled code does not tell
    if found:
        uses = ", ".join(f"{finding.name!r} in {finding.operation}" for finding in found)
        raise ConfigError(
            f"error signals go through the weights themselves of {uses}, which compiled code would not show: "
            "leave these layers exact by feedback.exclude"
        )


def _loss(state: TrainingState) -> Tensor:
    """Return the loss of the first backward pass of a mini-batch."""
    x, y = next(state.micro_batches(torch.arange(state.batch_size())))
    return F.cross_entropy(state.context.forward_alone(state.model, x), y)


def _gradients(state: TrainingState, loss: Tensor) -> None:
    """Run a backward that leaves no gradient behind."""
    parameters = [p for p in (*state.model.parameters(), *state.learned) if p.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


@contextmanager
def _as_it_was(state: TrainingState) -> Iterator[None]:
    """Put the network into training mode within this context; then restore modes, buffers and random
    states."""
    with preserved(state.model):
        state.train_mode()
        yield


def _reason(error: RuntimeError) -> str:
    """Return what torch.compile says first, without how to see more of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = next((line for line in lines if line.startswith("File ")), None)
    first = lines[0] if lines else type(error).__name__
    return first.rstrip(".") + (f" ({place})" if place else "")
