"""The rules of Liao, Leibo and Poggio (2016) by the paper's names, as choices of options."""

from __future__ import annotations

from dataclasses import dataclass, field

from feedbackhook.rules.options import Magnitude, Redraw, Scale
from feedbackhook.rules.random import Random
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.sign import Sign


@register_rule("uSF")
@dataclass(frozen=True)
class UniformSign(Sign):
    """uSF: V = sign(W)."""

    concordance: float = field(default=1.0, init=False)
    magnitude: Magnitude = field(default="uniform", init=False)
    redraw: Redraw = field(default="never", init=False)
    scale: Scale | float | None = field(default=None, init=False)


@register_rule("NuSF")
@dataclass(frozen=True)
class NormalizedUniformSign(UniformSign):
    """NuSF: V = sign(W) / fan_in."""

    scale: Scale | float | None = field(default="fan_in", init=False)


@register_rule("frSF")
@dataclass(frozen=True)
class FixedRandomSign(Sign):
    """frSF: V = M o sign(W) o S, with M and S drawn once and the sign of the current W."""

    magnitude: Magnitude = field(default="random", init=False)
    redraw: Redraw = field(default="never", init=False)
    scale: Scale | float | None = field(default=None, init=False)


@register_rule("brSF")
@dataclass(frozen=True)
class BatchwiseRandomSign(FixedRandomSign):
    """brSF: like frSF, with M and S drawn again after each update of W."""

    redraw: Redraw = field(default="update", init=False)


@register_rule("RndF")
@dataclass(frozen=True)
class RandomFeedback(Random):
    """RndF: V from N(0, 0.05^2), drawn once."""

    std: float | None = field(default=0.05, init=False)
    redraw: Redraw = field(default="never", init=False)
