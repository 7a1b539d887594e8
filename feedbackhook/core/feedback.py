"""The feedback weight of one layer: its rule, its random parts, and how often they have been drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.torch_internals import is_wrapped, transformed
from feedbackhook.rng import CounterRNG


class Rule(Protocol):
    """A feedback rule: a frozen dataclass of options with these two methods.

    A rule may also have

    - a field `redraw`: "never" (the default), or "update" to draw new random parts after each optimizer step
      that updates W;
    - a class attribute `exact_classifier`: True leaves the classifier exact, unless `patch` is given an
      `exclude`;
    - a method `check(layers)` that raises ValueError before anything is attached;
    - a method `expected_angle(weight)`: the angle in degrees between V and this W that follows from the
      rule's definition as long as the random parts are independent of W, as they are at the start.
    """

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw what V needs besides W, once or after each update of W. `rng.layer` describes the layer."""

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute V from the current W, in W's layout and dtype and on its device, without side effects."""


def redrawn_by_updates(rule: object) -> bool:
    """Whether the rule's random parts are drawn again after each update of W."""
    return getattr(rule, "redraw", "never") == "update"


class Feedback:
    """V as a function of the current W.

    Args:
        rule: how V is computed.
        layer: the layer that V belongs to.
        seed: the patch's seed. The random parts follow from it, the layer's name and the draw count.
        draws: how often the random parts have been redrawn.
        recompute: whether to draw the random parts again for each use instead of keeping them.
        fused: whether to draw them with one kernel made by `torch.compile`.
    """

    def __init__(
        self,
        rule: Rule,
        layer: LayerInfo,
        seed: int,
        draws: int = 0,
        recompute: bool = False,
        fused: bool = False,
    ) -> None:
        self.rule = rule
        self.layer = layer
        self.seed = seed
        self.draws = draws
        self.recompute = recompute
        self.fused = fused
        self._count = torch.tensor(draws)  # the draw count as a tensor, which compiled code can read
        self._keys: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, Tensor] | None = None
        self._drawn_for: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        """Return V, detached, in the layout and dtype and on the device of `weight`.

        Raises:
            ValueError: the rule returns a V of another shape.
        """
        return self.of(weight.detach())

    def of(self, weight: Tensor) -> Tensor:
        """Return V for a detached weight. Gradients must be disabled."""
        return self._made(self.rule, self.parts(weight), weight)

    def bound(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `of` with the current rule and random parts, which later changes do not affect."""
        rule, draws = self.rule, self.draws
        if self.recompute:
            return lambda w: self._made(rule, self._draw(rule, w, draws), w)
        parts = self.parts(weight)
        return lambda w: self._made(rule, parts, w)

    def parts(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Return the random parts for a weight of this shape, dtype and device, drawing them if needed."""
        if torch.compiler.is_compiling() and (self.recompute or redrawn_by_updates(self.rule)):
            # Part of the graph instead of a constant: each run of the compiled code reads the draw count.
            return self._draw(self.rule, weight, self._count.to(weight.device))
        if self.recompute:
            return self._draw(self.rule, weight, self.draws)
        wanted = (weight.shape, weight.dtype, weight.device)
        if self._parts is None or self._drawn_for != wanted:
            self._parts = self._draw(self.rule, weight, self.draws)
            self._drawn_for = wanted
        return self._parts

    def _made(self, rule: Rule, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        v = rule.feedback(weight, parts)
        if v.shape != weight.shape:
            raise ValueError(
                f"{type(rule).__name__} returned a feedback weight of shape {tuple(v.shape)} for "
                f"{self.layer.name!r}, whose weight has shape {tuple(weight.shape)}"
            )
        return v

    @torch.no_grad()
    def _draw(self, rule: Rule, weight: Tensor, count: int | Tensor) -> dict[str, Tensor]:
        if transformed() and is_wrapped(weight):
            # One draw for all members of an ensemble, as a tensor that outlives the transform. There is no
            # single weight here, so a rule that draws by the weight's values gets NaN.
            weight = torch.full(weight.shape, torch.nan, dtype=weight.dtype, device=weight.device)
        return rule.draw(weight, CounterRNG(self.seed, self.layer, count, self.fused, self._keys))

    def redraw(self) -> None:
        """Advance to the next draw, which happens when V is next needed."""
        self.draws += 1
        self._count.fill_(self.draws)
        self._parts = None

    def like(self, rule: Rule, seed: int, draws: int, drawn_as: str | None = None) -> Feedback:
        """Return a feedback of the same layer that keeps and draws its random parts in the same way.

        Args:
            rule: how V is computed.
            seed: as in the constructor.
            draws: as in the constructor.
            drawn_as: the layer name that the random parts follow from; None is the layer's current one.
        """
        layer = self.layer if drawn_as is None else dataclasses.replace(self.layer, name=drawn_as)
        return Feedback(rule, layer, seed, draws, self.recompute, self.fused)

    def copy(self) -> Feedback:
        """Return a feedback with the same random parts."""
        return self.like(self.rule, self.seed, self.draws, self.layer.name)

    def follow(self, rule: Rule) -> None:
        """Change the rule. The draw count stays, so parts that both rules draw alike stay the same."""
        self.rule = rule
        self._parts = None
