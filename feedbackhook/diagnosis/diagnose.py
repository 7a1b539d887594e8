"""During or after training: can an accuracy and an alignment angle be trusted?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from feedbackhook.core.angles import Sums, sums_of
from feedbackhook.core.feedback import redrawn_by_updates
from feedbackhook.core.layer import Patched
from feedbackhook.core.state import PatchHandle
from feedbackhook.diagnosis.checks import Check
from feedbackhook.diagnosis.credit import credit
from feedbackhook.diagnosis.diagnosed import Diagnosis
from feedbackhook.diagnosis.floor import Floor, floor_of
from feedbackhook.diagnosis.growth import Growth, observe_growth
from feedbackhook.diagnosis.passes import (
    Batch,
    Loss,
    Scales,
    check_whole,
    listed,
    loss_of,
    named_gradients,
    observe,
    preserved,
    trainable,
)
from feedbackhook.diagnosis.quantities import Gram, Moments
from feedbackhook.measurement import Row


def diagnose(
    patch: PatchHandle,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    draws: int = 3,
    forward: Callable[..., Any] | None = None,
) -> Diagnosis:
    """Check, layer by layer, whether an alignment angle and an accuracy of this network can be trusted.

    | check | value |
    |---|---|
    | floor | the exact gradient's norm over the smallest that the number format resolves here |
    | angle | the angle between delivered and exact gradient; NaN at the floor |
    | growth | the largest ratio of activations, from the input to the output of a module |
    | stability | the mean cosine of delivered gradients between batches, beside the exact one's |
    | signal | the signal to noise of delivered gradients, with their bias and variance |
    | credit | the fall of the loss for a small step along the delivered gradient, over the exact one's |

    `feedbackhook.diagnosis.checks.KINDS` has each check's threshold and its source. The model runs in the
    training mode in which it is. Afterwards its weights, `.grad`, buffers, training modes and hooks, the
    patch with its draws and counts, and the random states are as they were, also after an error.

    It takes three passes over each batch, and for the credit four forwards of each layer over the first
    batch. While it runs, it holds (draws + 1) copies of all gradients for each batch (2, unless the rule
    draws again after each update).

    Args:
        patch: the patch.
        batches: two or more pairs (input, target), or mappings of keyword arguments of the model, on its
            device. All are used, so pass `itertools.islice(loader, 4)` rather than a whole loader.
        loss: a function of the model's output and the target, such as `torch.nn.functional.cross_entropy`;
            for a mapping, of the output and the mapping. It returns a scalar.
        draws: number of draws of rules that draw again after each update, such as "brSF".
        forward: called instead of the model, for example to run it in mixed precision.

    Returns:
        The checks of each layer in the order of `patch.layers`, then those of the whole model.

    Raises:
        ValueError: `batches` is empty, `draws` is less than 2, the patch is disabled, or the loss is no
            scalar or has no graph.
        TypeError: a batch is neither a pair nor a mapping.
        RuntimeError: compiled code ran, or parameters are sharded.
    """
    check_whole(patch)
    if not patch.state.enabled:
        raise ValueError("the patch is disabled, so there is nothing to diagnose; set patch.enabled = True")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise ValueError(f"draws must be an integer of at least 2, not {draws!r}")
    given = listed(batches, patch.model)
    with _untouched(patch):
        passes = _Passes(patch, given, loss, forward)
        passes.run(draws if passes.redrawn else 1)
        checks = [check for each in patch.state.patched for check in _layer_checks(each, passes)]
        whole, where = passes.growth.largest()
        threshold = _growth_threshold(passes.growth)
        checks.append(Check(None, None, "growth", whole, threshold, f"at {where}" if where else ""))
    extra = [row for each in patch.state.patched for row in passes.extra.get(each, [])]
    return Diagnosis(checks, extra, len(given))


@contextmanager
def _untouched(patch: PatchHandle) -> Iterator[None]:
    """Restore the patch and the targets that it was given; its layers get copies of their feedback."""
    state = patch.state
    targets, exact = state.targets, state.exact
    try:
        with state.undisturbed():
            for each in state.patched:
                each.feedback = each.feedback.copy()
            yield
    finally:
        state.targets, state.exact = targets, exact


@dataclass
class _Passes:
    """The gradients of every batch, delivered in each draw and exact, and what was observed on the way."""

    patch: PatchHandle
    batches: list[Batch]
    loss: Loss
    forward: Callable[..., Any] | None
    delivered: list[dict[int, Tensor]] = field(default_factory=list)
    exact: list[dict[int, Tensor]] = field(default_factory=list)
    scales: list[dict[Patched, Scales]] = field(default_factory=list)
    growth: Growth = field(default_factory=Growth)
    extra: dict[Patched, list[Row]] = field(default_factory=dict)

    @property
    def redrawn(self) -> bool:
        """Whether a rule draws again after each update."""
        return any(redrawn_by_updates(each.feedback.rule) for each in self.patch.state.patched)

    def run(self, draws: int) -> None:
        """Run all batches, in each draw."""
        state, model = self.patch.state, self.patch.model
        parameters = [p for each in state.patched for p in trainable(each)]
        for draw in range(draws):
            if draw:
                for each in state.patched:
                    if redrawn_by_updates(each.feedback.rule):
                        each.feedback.redraw()
            for batch in self.batches:
                with preserved(model), observe(state) as observed, observe_growth(model) as growth:
                    value = loss_of(model, batch, self.loss, state, self.forward)
                    self.delivered.append(named_gradients(value, parameters, keep=True))
                    if draw:
                        continue
                    with state.exact_backward():
                        self.exact.append(named_gradients(value, parameters))
                self.scales.append(observed.of)
                self.growth.include(growth)

    def first_loss(self) -> float:
        """Return the loss of the first batch, as the passes saw it."""
        with preserved(self.patch.model), torch.no_grad():
            return float(loss_of(self.patch.model, self.batches[0], self.loss, None, self.forward))


def _layer_checks(each: Patched, passes: _Passes) -> Iterator[Check]:
    """Yield the checks of one layer."""
    name, depth, parameters = each.info.name, each.depth, trainable(each)
    known = [p for p in parameters if all(id(p) in found for found in (*passes.exact, *passes.delivered))]

    def check(kind: str, value: float, threshold: float, note: str = "") -> Check:
        return Check(name, depth, kind, value, threshold, note)

    ratio, where = passes.growth.within(name)
    if not known:
        why = "its weight gets no gradient" if parameters else "its weight is frozen"
        yield check("floor", math.nan, 1.0, why)
        yield check("growth", ratio, _growth_threshold(passes.growth), f"at {where}" if where else "")
        return
    exact = [[found[id(p)] for p in known] for found in passes.exact]
    delivered = [[found[id(p)] for p in known] for found in passes.delivered]
    floors = [
        floor_of(each, _norm(gradient), scales.get(each))
        for gradient, scales in zip(exact, passes.scales, strict=True)
    ]
    lowest = min(floors, key=lambda floor: floor.ratio)
    yield check("floor", lowest.ratio if lowest.gradient else math.nan, 1.0, lowest.reason or "")
    yield _angle(each, delivered[: len(exact)], exact, floors)
    yield check("growth", ratio, _growth_threshold(passes.growth), f"at {where}" if where else "")
    gram = Gram.of(delivered, exact)
    moments = Moments.of(gram)
    passes.extra[each] = list(_moment_rows(each, moments))
    yield check("stability", *_stability(moments, gram.entries))
    yield check("signal", *_signal(moments))
    found = credit(passes.first_loss, known, delivered[0], exact[0])
    unclear = "" if found.exact > found.resolution else "the exact step's fall is within rounding errors"
    yield check("credit", found.ratio, found.uncertainty, unclear)


def _angle(
    each: Patched, delivered: list[list[Tensor]], exact: list[list[Tensor]], floors: list[Floor]
) -> Check:
    """Return the mean angle over the batches whose exact gradient is above the floor."""
    angles, entries = [], 0
    for g, backprop, floor in zip(delivered, exact, floors, strict=True):
        entries = sum(part.numel() for part in backprop)
        if floor.reason is None:
            pairs = zip(g, backprop, strict=True)
            angles.append(Sums.total(Sums(*sums_of(a, b, signs=False).tolist()) for a, b in pairs).angle)
    reasons = [floor.reason for floor in floors if floor.reason is not None]
    note = reasons[0] if reasons else ""
    if reasons and angles:
        note = f"without {len(reasons)} of {len(floors)} batches: {note}"
    mean = sum(angles) / len(angles) if angles else math.nan
    threshold = 90 - 2 * math.degrees(1 / math.sqrt(max(1, entries)))
    return Check(each.info.name, each.depth, "angle", mean, threshold, note)


_TOO_FEW = "needs two batches"


def _stability(moments: Moments, entries: int) -> tuple[float, float, str]:
    """Return value, threshold and note; there is no threshold if backprop itself does not pass it."""
    if not moments.pairs:
        return math.nan, math.nan, _TOO_FEW
    chance = 2 / math.sqrt(entries * moments.pairs)
    if moments.exact_stability > chance:
        return moments.stability, chance, f"exact: {moments.exact_stability:.3g}"
    return moments.stability, math.nan, "backprop's own gradients are unrelated between these batches"


def _signal(moments: Moments) -> tuple[float, float, str]:
    """Return value, threshold and note; there is no threshold if backprop itself does not pass it."""
    if not moments.pairs:
        return math.nan, math.nan, _TOO_FEW
    if moments.exact_signal_to_noise > moments.exact_uncertainty:
        return moments.signal_to_noise, moments.uncertainty, f"exact: {moments.exact_signal_to_noise:.3g}"
    return (
        moments.signal_to_noise,
        math.nan,
        "backprop's own signal is within its error over these batches; pass more of them, or larger ones",
    )


def _moment_rows(each: Patched, moments: Moments) -> Iterator[Row]:
    for metric in ("bias", "noise", "draw_noise", "exact_noise", "exact_stability"):
        yield Row(each.info.name, each.depth, f"check_{metric}", getattr(moments, metric))
    exact = moments.exact_signal_to_noise
    yield Row(each.info.name, each.depth, "check_exact_signal", exact)


def _growth_threshold(growth: Growth) -> float:
    return 1 / growth.unit if growth.unit else math.nan


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.double())) for t in tensors))
