"""One layer's feedback: its rule, its random parts and how often they were drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from feedbackhook.rng import CounterRNG
from feedbackhook.rules import Rule
from feedbackhook.targets import LayerInfo


class Feedback:
    """V as a function of today's W.

    Args:
        rule: how V is made.
        layer: the layer for which.
        seed: the patch's; with the layer's name and the draw count it decides the random parts.
        draws: how often the random parts have been drawn anew.
    """

    def __init__(self, rule: Rule, layer: LayerInfo, seed: int, draws: int = 0) -> None:
        self.rule = rule
        self.layer = layer
        self.seed = seed
        self.draws = draws
        self._parts: dict[str, Tensor] | None = None
        self._drawn_for: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        """V in the layout, dtype and on the device of `weight`, detached.

        Raises:
            ValueError: the rule gives V another shape.
        """
        weight = weight.detach()
        v = self.rule.feedback(weight, self.parts(weight))
        if v.shape != weight.shape:
            raise ValueError(
                f"{type(self.rule).__name__} gives {self.layer.name!r} a feedback weight of shape "
                f"{tuple(v.shape)}; the weight has {tuple(weight.shape)}"
            )
        return v

    @torch.no_grad()
    def parts(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The random parts for a weight of this shape, dtype and device: drawn where they are not at hand."""
        wanted = (weight.shape, weight.dtype, weight.device)
        if self._parts is None or self._drawn_for != wanted:
            self._parts = self.rule.draw(weight, CounterRNG(self.seed, self.layer, self.draws))
            self._drawn_for = wanted
        return self._parts

    def redraw(self) -> None:
        """Moves to the next draw; it is made when V is next asked for."""
        self.draws += 1
        self._parts = None

    def follow(self, rule: Rule) -> None:
        """Changes the rule. The draw count stays, so what both rules draw alike stays as it is."""
        self.rule = rule
        self._parts = None
