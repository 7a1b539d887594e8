"""Measuring while training goes on: `Patch.watch`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from feedbackhook.alignment import ErrorAngles, Row, observed, weight_rows
from feedbackhook.rules import expected_angle

if TYPE_CHECKING:
    from feedbackhook.patching import Patch
    from feedbackhook.recorder import Recorder


class Watch:
    """The handle that `Patch.watch` returns.

    Attributes:
        step: how often the optimizer has stepped.
    """

    def __init__(
        self, patch: Patch, every: int, recorder: Recorder, step: int = 0, per_sample: bool = False
    ) -> None:
        for name, value, least in (("every", every, 1), ("step", step, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, {least} or more, not {value!r}")
        self.step = step
        self._patch, self._every, self._recorder, self._per_sample = patch, every, recorder, per_sample
        self._first = step
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._looking = ExitStack()
        self._errors: ErrorAngles | None = None
        self._backwards: list[int] = []  # the last ones before it began to look
        patch._bracket.watches.append(self)
        self._look_if_due()

    def remove(self) -> None:
        """Ends the watch; twice is fine."""
        self._stop_looking()
        if self in self._patch._bracket.watches:
            self._patch._bracket.watches.remove(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Records, if this step is watched. Called before an optimizer that holds a patched weight steps."""
        if self._errors is None or torch.compiler.is_compiling():
            return
        bracket = self._patch._bracket
        if self._backwards == self._last_backwards():
            if any(layer.compiled for layer in bracket.layers):
                raise RuntimeError(
                    "patch.watch saw no error signal: compiled code shows none. Train the uncompiled model, "
                    "or take feedbackhook.measure(patch) for what V and W alone tell"
                )
            return  # another optimizer's step after the same backward
        rows = [*weight_rows(bracket), *self._errors.rows(bracket.layers), *self._norms()]
        rows += self._rates(optimizer)
        if self.step == 0:
            rows += self._expected()
        self._stop_looking()
        recorder = self._recorder
        for row in rows:
            recorder.add(self.step, recorder.epoch, row.metric, row.value, row.layer, row.depth)
        if recorder.histograms:
            self._draw_histograms()

    def after_step(self, optimizer: Optimizer) -> None:
        """Counts. Where several optimizers hold patched weights, the one that has stepped most tells."""
        self._steps[optimizer] = self._steps.get(optimizer, self._first) + 1
        if self._steps[optimizer] > self.step:
            self.step = self._steps[optimizer]
            self._stop_looking()
            self._look_if_due()

    def _look_if_due(self) -> None:
        if self.step % self._every == 0:
            self._errors = self._looking.enter_context(observed(self._patch._bracket, self._per_sample))
            self._backwards = self._last_backwards()

    def _last_backwards(self) -> list[int]:
        """Which backward has last reached each layer."""
        return [layer.last_backward for layer in self._patch._bracket.layers]

    def _stop_looking(self) -> None:
        self._looking.close()
        self._errors = None

    def _expected(self) -> Iterator[Row]:
        """The weight angles that the rules' definitions let expect at the start."""
        for layer in self._patch._bracket.layers:
            degrees = expected_angle(layer.feedback.rule, layer.weight())
            if degrees is not None:
                yield Row(layer.info.name, layer.depth, "expected_weight_angle", degrees)

    def _norms(self) -> Iterator[Row]:
        """Euclidean norms of weights and of their gradients as they lie in `.grad`: of each layer's, and of
        all the model's parameters."""
        groups: list[tuple[str | None, int | None, list[Tensor]]] = [
            (layer.info.name, layer.depth, list(layer.parameters())) for layer in self._patch._bracket.layers
        ]
        groups.append((None, None, list(self._patch.model.parameters())))
        for name, depth, parameters in groups:
            gradients = [p.grad for p in parameters if p.grad is not None]
            yield Row(name, depth, "weight_norm", _norm(parameters))
            yield Row(name, depth, "gradient_norm", _norm(gradients) if gradients else float("nan"))

    def _rates(self, optimizer: Optimizer) -> Iterator[Row]:
        """The learning rate; where groups of parameters have their own, that of each layer."""
        rate = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        if len(set(rate.values())) == 1:
            yield Row(None, None, "learning_rate", next(iter(rate.values())))
            return
        for layer in self._patch._bracket.layers:
            for lr in {rate[id(p)] for p in layer.parameters() if id(p) in rate}:
                yield Row(layer.info.name, layer.depth, "learning_rate", lr)

    def _draw_histograms(self) -> None:
        for layer in self._patch._bracket.layers:
            w = layer.weight().detach()
            gradients = [p.grad for p in layer.parameters() if p.grad is not None]
            for name, values in {"W": [w], "V": [layer.feedback(w)], "gradient": gradients}.items():
                for value in values:
                    self._recorder.add_histogram(self.step, f"{name}/{layer.info.name}", value)


def _norm(tensors: list[Tensor]) -> float:
    norm = torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors])
    gather = getattr(norm, "full_tensor", None)  # of sharded ones
    return float(norm if gather is None else gather())
