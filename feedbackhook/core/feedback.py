"""One layer's feedback: its rule, its random parts and how often they were drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from feedbackhook.core.torch_internals import is_wrapped, transformed
from feedbackhook.rng import CounterRNG
from feedbackhook.rules import Rule, redrawn_by_updates
from feedbackhook.selection import LayerInfo


class Feedback:
    """V as a function of today's W.

    Args:
        rule: how V is made.
        layer: the layer for which.
        seed: the patch's; with the layer's name and the draw count it decides the random parts.
        draws: how often the random parts have been drawn anew.
        recompute: whether the random parts are drawn again for each use, and none are kept.
        fused: whether one kernel that `torch.compile` makes draws them.
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
        self._count = torch.tensor(draws)  # the same number, for compiled code to read
        self._keys: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, Tensor] | None = None
        self._drawn_for: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        """V in the layout, dtype and on the device of `weight`, detached.

        Raises:
            ValueError: the rule gives V another shape.
        """
        return self.of(weight.detach())

    def of(self, weight: Tensor) -> Tensor:
        """The same of a detached weight, where gradients are disabled already."""
        return self._made(self.rule, self.parts(weight), weight)

    def bound(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """`of` as it is now for weights like this one, whatever is drawn or set later."""
        rule, draws = self.rule, self.draws
        if self.recompute:
            return lambda w: self._made(rule, self._draw(rule, w, draws), w)
        parts = self.parts(weight)
        return lambda w: self._made(rule, parts, w)

    def parts(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The random parts for a weight of this shape, dtype and device: drawn where they are not at hand."""
        if torch.compiler.is_compiling() and (self.recompute or redrawn_by_updates(self.rule)):
            # Part of the graph, not a constant of it: each run of the compiled code draws by today's count.
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
                f"{type(rule).__name__} gives {self.layer.name!r} a feedback weight of shape "
                f"{tuple(v.shape)}; the weight has {tuple(weight.shape)}"
            )
        return v

    @torch.no_grad()
    def _draw(self, rule: Rule, weight: Tensor, count: int | Tensor) -> dict[str, Tensor]:
        if transformed() and is_wrapped(weight):
            # One draw for all members of an ensemble, and none that belongs to a transform which ends. There
            # is no one weight, so a rule that draws by its values gets NaN.
            weight = torch.full(weight.shape, torch.nan, dtype=weight.dtype, device=weight.device)
        return rule.draw(weight, CounterRNG(self.seed, self.layer, count, self.fused, self._keys))

    def redraw(self) -> None:
        """Moves to the next draw; it is made when V is next asked for."""
        self.draws += 1
        self._count.fill_(self.draws)
        self._parts = None

    def like(self, rule: Rule, seed: int, draws: int, drawn_as: str | None = None) -> Feedback:
        """Another of the same layer, which keeps and makes its parts in the same way.

        Args:
            drawn_as: the name that, with the seed, decides the random parts; the layer's own if None.
        """
        layer = self.layer if drawn_as is None else dataclasses.replace(self.layer, name=drawn_as)
        return Feedback(rule, layer, seed, draws, self.recompute, self.fused)

    def follow(self, rule: Rule) -> None:
        """Changes the rule. The draw count stays, so what both rules draw alike stays as it is."""
        self.rule = rule
        self._parts = None
