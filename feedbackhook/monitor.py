"""Measuring while training goes on: `Patch.watch`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from feedbackhook.core.torch_internals import current_backward
from feedbackhook.measurement import ErrorAngles, Row, gathered, observed, weight_rows
from feedbackhook.rules import expected_angle

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from feedbackhook.patching import Patch
    from feedbackhook.store.recorder import Recorder


class Watch:
    """The handle that `Patch.watch` returns.

    Attributes:
        step: how often the optimizer has stepped.
    """

    def __init__(
        self,
        patch: Patch,
        every: int,
        recorder: Recorder,
        step: int = 0,
        per_sample: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        for name, value, least in (("every", every, 1), ("step", step, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, {least} or more, not {value!r}")
        self.step = step
        self._patch, self._every, self._recorder, self._per_sample = patch, every, recorder, per_sample
        self._group = group
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._looking = ExitStack()
        self._errors: ErrorAngles | None = None
        self._backwards = self._last_backwards()  # those before this step
        patch._bracket.watches.append(self)
        self._look_if_due()

    def remove(self) -> None:
        """Ends the watch; twice is fine."""
        self._stop_looking()
        if self in self._patch._bracket.watches:
            self._patch._bracket.watches.remove(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Records, if this step is watched. Called before an optimizer that holds a patched weight steps."""
        if torch.compiler.is_compiling():
            raise RuntimeError("patch.watch cannot follow a compiled optimizer.step; leave it uncompiled")
        if current_backward() != -1:
            raise RuntimeError(
                "patch.watch cannot follow an optimizer that steps inside the backward: at no moment are all "
                "gradients there; call optimizer.step() after it"
            )
        arrived = self._backwards != self._last_backwards()
        if self._count_of(optimizer) < self.step:
            if arrived:
                raise RuntimeError(
                    "patch.watch follows one backward a step, and here two optimizers hold patched weights "
                    "and step after a backward each: patch their networks one by one, and watch each"
                )
            if (self.step - 1) % self._every == 0:  # the second optimizer of a watched step
                self._record(self.step - 1, self._rates(optimizer))
            return
        if self._errors is None:
            return
        bracket = self._patch._bracket
        if not arrived:
            if any(layer.compiled for layer in bracket.layers):
                raise RuntimeError(
                    "patch.watch saw no error signal: compiled code shows none. Train the uncompiled model, "
                    "or take feedbackhook.measure(patch) for what V and W alone tell"
                )
            return  # a step without a backward, or one that has it inside
        errors = self._errors
        self._stop_looking()
        expected = self._expected() if self.step == 0 else ()
        rows = (
            weight_rows(bracket),
            errors.rows(bracket.layers, self._group),
            self._norms(optimizer),
            expected,
        )
        self._record(self.step, [row for part in rows for row in part])
        self._record(self.step, self._rates(optimizer))
        if self._recorder.histograms:
            self._draw_histograms()

    def after_step(self, optimizer: Optimizer) -> None:
        """Counts. Where several optimizers hold patched weights, the one that has stepped most tells."""
        arrived = self._backwards != self._last_backwards()
        if arrived and self._errors is not None:
            self.remove()
            raise RuntimeError(
                "patch.watch cannot follow optimizer.step(closure), which runs its backward inside the step; "
                "take feedbackhook.measure(patch, loss). The watch has ended"
            )
        self._steps[optimizer] = self._count_of(optimizer) + 1
        if self._steps[optimizer] > self.step:
            self.step = self._steps[optimizer]
            self._backwards = self._last_backwards()
            self._stop_looking()
            self._look_if_due()
        self._recorder.flush_if_due()

    def _count_of(self, optimizer: Optimizer) -> int:
        """How many steps an optimizer has done: one that is new leads if it follows a backward of its own."""
        if optimizer in self._steps:
            return self._steps[optimizer]
        leads = not self._steps or self._backwards != self._last_backwards()
        return self.step if leads else self.step - 1

    def _last_backwards(self) -> list[int]:
        """Which backward has last reached each layer."""
        return [layer.last_backward for layer in self._patch._bracket.layers]

    def _look_if_due(self) -> None:
        if self.step % self._every == 0:
            self._errors = self._looking.enter_context(observed(self._patch._bracket, self._per_sample))

    def _stop_looking(self) -> None:
        self._looking.close()
        self._errors = None

    def _record(self, step: int, rows: Iterable[Row]) -> None:
        recorder = self._recorder
        for row in rows:
            recorder.add(step, recorder.epoch, row.metric, row.value, row.layer, row.depth)

    def _expected(self) -> Iterator[Row]:
        """The weight angles that the rules' definitions let expect at the start."""
        for layer in self._patch._bracket.layers:
            degrees = expected_angle(layer.feedback.rule, layer.weight())
            if degrees is not None:
                yield Row(layer.info.name, layer.depth, "expected_weight_angle", degrees)

    def _norms(self, optimizer: Optimizer) -> Iterator[Row]:
        """Euclidean norms of weights and of their gradients: of each layer's, and of all the model's
        parameters."""
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer undoes the scaling in its step
        factor = 1.0 if scale is None else 1 / float(scale)
        weights: dict[Tensor, float] = {p: _norm(p.detach()) for p in self._patch.model.parameters()}
        gradients = {p: _norm(p.grad) * factor for p in weights if p.grad is not None}
        groups: list[tuple[str | None, int | None, list[Tensor]]] = [
            (layer.info.name, layer.depth, list(layer.parameters())) for layer in self._patch._bracket.layers
        ]
        groups.append((None, None, list(weights)))
        for name, depth, parameters in groups:
            yield Row(name, depth, "weight_norm", math.hypot(*(weights[p] for p in parameters)))
            arrived = [gradients[p] for p in parameters if p in gradients]
            yield Row(name, depth, "gradient_norm", math.hypot(*arrived) if arrived else math.nan)

    def _rates(self, optimizer: Optimizer) -> Iterator[Row]:
        """The learning rate; where it is not one for all layers, that of each layer which the optimizer
        holds. NaN where the optimizer finds its own."""
        rate = {
            id(p): math.nan if (lr := group.get("lr")) is None else float(lr)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        layers = self._patch._bracket.layers
        trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        if len(set(rate.values())) == 1 and all(id(p) in rate for p in trained):
            yield Row(None, None, "learning_rate", next(iter(rate.values())))
            return
        for layer in layers:
            for lr in {rate[id(p)] for p in layer.parameters() if id(p) in rate}:
                yield Row(layer.info.name, layer.depth, "learning_rate", lr)

    def _draw_histograms(self) -> None:
        for layer in self._patch._bracket.layers:
            w = layer.weight().detach()
            gradients = [gathered(p.grad) for p in layer.parameters() if p.grad is not None]
            for name, values in {"W": [w], "V": [layer.feedback(w)], "gradient": gradients}.items():
                for value in values:
                    self._recorder.add_histogram(self.step, f"{name}/{layer.info.name}", value)


def _norm(tensor: Tensor) -> float:
    """The Euclidean norm, summed in float32 or better."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return float(gathered(torch.linalg.vector_norm(dense if dense.dtype == torch.float64 else dense.float())))
