"""Measure during training: `Patch.watch`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from feedbackhook.core.angles import gathered
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.learners import learned_parameters
from feedbackhook.core.state import PatchHandle
from feedbackhook.core.torch_internals import current_backward
from feedbackhook.measurement import (
    ErrorAngles,
    Row,
    WeightSums,
    collect_error_angles,
    weight_rows,
    weight_sums,
)
from feedbackhook.rules import expected_angle

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from feedbackhook.store.recorder import Recorder


class Watch:
    """The handle that `Patch.watch` returns.

    Args:
        patch: the patch to watch.
        every: record every N optimizer steps.
        recorder: receives the rows.
        step: number of steps done already.
        per_sample: as in `feedbackhook.measure`.
        group: as in `Patch.watch`.

    Attributes:
        step: number of optimizer steps so far.
    """

    def __init__(
        self,
        patch: PatchHandle,
        every: int,
        recorder: Recorder,
        step: int = 0,
        per_sample: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        for name, value, least in (("every", every, 1), ("step", step, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        self.step = step
        self._model, self._state = patch.model, patch.state
        self._every, self._recorder, self._per_sample, self._group = every, recorder, per_sample, group
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._collecting = ExitStack()
        self._errors: ErrorAngles | None = None
        self._backwards = self._last_backwards()  # those before this step
        self._handle = self._state.listen_to_steps(self)
        self._collect_if_due()

    def remove(self) -> None:
        """Stop watching. Calling this again does nothing."""
        self._stop_collecting()
        self._handle.remove()

    def before_step(self, optimizer: Optimizer) -> None:
        """Record if this step is due. Called before any optimizer steps."""
        if not self._state.held_by(optimizer):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("patch.watch cannot follow a compiled optimizer.step; leave it uncompiled")
        if current_backward() != -1:
            raise RuntimeError(
                "patch.watch cannot follow an optimizer that steps inside the backward, since the gradients "
                "are never all there at once; call optimizer.step() after the backward"
            )
        arrived = self._backwards != self._last_backwards()
        if self._count_of(optimizer) < self.step:
            self._record_another(optimizer, arrived)
            return
        if self._errors is None:
            return
        if not arrived:
            if any(layer.compiled for layer in self._state.patched):
                raise RuntimeError(
                    "patch.watch saw no error signal, since compiled code shows none. Train the uncompiled "
                    "model, or call feedbackhook.measure(patch) for what needs only V and W"
                )
            return  # a step without a backward, or with the backward inside it
        self._record_step(optimizer, self._errors)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step. If several optimizers hold patched weights, the one with the most steps counts."""
        if not self._state.held_by(optimizer):
            return
        arrived = self._backwards != self._last_backwards()
        if arrived and self._errors is not None:
            self.remove()
            raise RuntimeError(
                "patch.watch cannot follow optimizer.step(closure), which runs its backward inside the step; "
                "call feedbackhook.measure(patch, loss) instead. The watch has ended"
            )
        self._steps[optimizer] = self._count_of(optimizer) + 1
        if self._steps[optimizer] > self.step:
            self.step = self._steps[optimizer]
            self._backwards = self._last_backwards()
            self._stop_collecting()
            self._collect_if_due()
        self._recorder.flush_if_due()

    def _record_step(self, optimizer: Optimizer, errors: ErrorAngles) -> None:
        """Record all values of the step that is about to happen."""
        self._stop_collecting()
        weights = weight_sums(self._state)
        rows = [
            *weight_rows(self._state, weights),
            *errors.rows(self._state.patched, self._group),
            *self._norms(optimizer, weights),
            *(self._expected() if self.step == 0 else ()),
            *self._learning_rates(optimizer),
        ]
        self._record(self.step, rows)
        if self._recorder.histograms:
            self._record_histograms()

    def _record_another(self, optimizer: Optimizer, arrived: bool) -> None:
        """Record the learning rates of another optimizer that makes the same step."""
        if arrived:
            raise RuntimeError(
                "patch.watch follows one backward per step, but here two optimizers hold patched weights and "
                "step after a backward each; patch their networks separately, and watch each"
            )
        if (self.step - 1) % self._every == 0:
            self._record(self.step - 1, self._learning_rates(optimizer))

    def _count_of(self, optimizer: Optimizer) -> int:
        """Return how many steps an optimizer has done. A new one leads if it follows its own backward."""
        if optimizer in self._steps:
            return self._steps[optimizer]
        leads = not self._steps or self._backwards != self._last_backwards()
        return self.step if leads else self.step - 1

    def _last_backwards(self) -> list[int]:
        """Return which backward has last reached each layer."""
        return [layer.last_backward for layer in self._state.patched]

    def _collect_if_due(self) -> None:
        if self.step % self._every == 0:
            self._errors = self._collecting.enter_context(collect_error_angles(self._state, self._per_sample))

    def _stop_collecting(self) -> None:
        self._collecting.close()
        self._errors = None

    def _record(self, step: int, rows: Iterable[Row]) -> None:
        recorder = self._recorder
        for row in rows:
            recorder.add(step, recorder.epoch, row.metric, row.value, row.layer, row.depth)

    def _expected(self) -> Iterator[Row]:
        """Yield the weight angles at the start that follow from the rules' definitions."""
        for layer in self._state.layers:
            degrees = expected_angle(layer.feedback.rule, layer.weight())
            if degrees is not None:
                yield Row(layer.info.name, layer.depth, "expected_weight_angle", degrees)

    def _norms(self, optimizer: Optimizer, sums: WeightSums) -> Iterator[Row]:
        """Yield the Euclidean norms of weights and of their gradients: for each layer, and for all parameters
        of the model together."""
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer undoes the scaling in its step
        factor = 1.0 if scale is None else 1 / float(scale)
        parameters: list[Tensor] = list(self._model.parameters())
        others = [p for p in parameters if p not in sums.squares]
        arrived = {p: p.grad for p in parameters if p.grad is not None}
        found = _norms_of([*others, *arrived.values()])
        weights = {p: math.sqrt(square) for p, square in sums.squares.items()}
        weights |= dict(zip(others, found[: len(others)], strict=True))
        gradients = dict(zip(arrived, (norm * factor for norm in found[len(others) :]), strict=True))
        groups: list[tuple[str | None, int | None, list[Tensor]]] = [
            (layer.info.name, layer.depth, list(layer.parameters())) for layer in self._state.patched
        ]
        groups.append((None, None, parameters))
        for name, depth, own in groups:
            yield Row(name, depth, "weight_norm", math.hypot(*(weights[p] for p in own)))
            norms = [gradients[p] for p in own if p in gradients]
            yield Row(name, depth, "gradient_norm", math.hypot(*norms) if norms else math.nan)

    def _learning_rates(self, optimizer: Optimizer) -> Iterator[Row]:
        """Yield the learning rate, or that of each layer that the optimizer holds if they differ.

        It is NaN if the optimizer chooses its own.
        """
        learned = {id(p) for p in learned_parameters(self._state)}
        rate = {
            id(p): math.nan if (lr := group.get("lr")) is None else float(lr)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) not in learned
        }
        layers = self._state.patched
        trainable = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        if len(set(rate.values())) == 1 and all(id(p) in rate for p in trainable):
            yield Row(None, None, "learning_rate", next(iter(rate.values())))
            return
        for layer in layers:
            for lr in {rate[id(p)] for p in layer.parameters() if id(p) in rate}:
                yield Row(layer.info.name, layer.depth, "learning_rate", lr)

    def _record_histograms(self) -> None:
        for layer in self._state.layers:
            w = layer.weight().detach()
            gradients = [gathered(p.grad) for p in layer.parameters() if p.grad is not None]
            v = [layer.feedback(w)] if isinstance(layer.feedback, Feedback) else []
            for name, values in {"W": [w], "V": v, "gradient": gradients}.items():
                for value in values:
                    self._recorder.add_histogram(self.step, f"{name}/{layer.info.name}", value)


def _norms_of(tensors: Iterable[Tensor]) -> list[float]:
    """Return the Euclidean norms, summed in float32 or better, with one transfer from their device."""
    norms = [_norm(tensor.detach()) for tensor in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []


def _norm(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    narrow = torch.float32 if dense.dtype in (torch.float16, torch.bfloat16) else None
    return gathered(torch.linalg.vector_norm(dense, dtype=narrow))
