"""Feedback rules: pure functions from a feedforward weight W and random parts to a feedback weight V.

Letters: W feedforward weight, V feedback weight, M magnitudes, S signs (+1 or -1), `o` the elementwise
product, sign(0) = 0. W and V have PyTorch's layout of the layer in question.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor

from feedbackhook.names import nearest
from feedbackhook.rng import CounterRNG
from feedbackhook.selection import LayerInfo

Magnitude = Literal["random", "uniform", "weight"]
Redraw = Literal["never", "update"]


class Rule(Protocol):
    """What a rule is: a frozen dataclass of its options with these two methods.

    A rule may also have a field `redraw` ("never", the default, or "update": new parts after each update of
    W by an optimizer), a method `check(layers)` that raises a ValueError before anything is attached, and a
    method `expected_angle(weight)`: the angle between V and this W, in degrees, that its definition lets
    expect where the random parts know nothing of W, as at the start.
    """

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """What V needs beside W, made once or after each update of W; `rng.layer` tells the layer."""

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """V in W's layout, dtype and device, from today's W; without side effects."""


RuleClass = TypeVar("RuleClass", bound=type)
_RULES: dict[str, type] = {}


def register_rule(name: str) -> Callable[[RuleClass], RuleClass]:
    """Class decorator: makes a rule known to `feedbackhook.patch` as mode `name`.

    Raises:
        TypeError: the class is no frozen dataclass or lacks `draw` or `feedback`.
        ValueError: the name is taken by another rule.
    """

    def register(cls: RuleClass) -> RuleClass:
        if not (dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen):  # noqa: B009
            raise TypeError(f"rule {name!r}: {cls.__name__} must be a @dataclass(frozen=True) of its options")
        missing = [method for method in ("draw", "feedback") if not callable(getattr(cls, method, None))]
        if missing:
            raise TypeError(f"rule {name!r}: {cls.__name__} lacks {' and '.join(missing)}")
        known = _RULES.get(name)
        if known is not None and not _same_class(known, cls):
            raise ValueError(f"rule {name!r} is taken by {known.__module__}.{known.__qualname__}")
        _RULES[name] = cls
        return cls

    return register


def make_rule(mode: str, options: Mapping[str, Any]) -> Rule:
    """The rule named `mode` with `options`.

    Raises:
        ValueError: the mode is unknown, or an option is out of range.
        TypeError: the rule has no such option, or an option is of the wrong type.
    """
    if not isinstance(mode, str):
        raise TypeError(f"mode is the name of a rule, not {mode!r}; known: {', '.join(_RULES)}")
    if mode not in _RULES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(_RULES)}{nearest(mode, _RULES)}")
    cls = _RULES[mode]
    return cast(Rule, cls(**_as_fields(mode, cls, options)))


def rule_name(rule: Rule) -> str:
    """The mode under which the rule's class is registered."""
    return next(name for name, cls in _RULES.items() if _same_class(cls, type(rule)))


def rule_values(rule: Rule) -> dict[str, Any]:
    """A rule's options and their values: `make_rule(rule_name(rule), rule_values(rule))` is the rule."""
    return {option: getattr(rule, f.name) for option, f in _options(type(rule)).items()}


def describe(rule: Rule) -> str:
    """The rule as a user would write it, with the options that differ from their defaults."""
    fields = _options(type(rule))
    shown = [
        f"{option}=..." if isinstance(value, Mapping) else f"{option}={value!r}"
        for option, value in rule_values(rule).items()
        if fields[option].default is dataclasses.MISSING or value != fields[option].default
    ]
    return rule_name(rule) + (f"({', '.join(shown)})" if shown else "")


def changed(rule: Rule, options: Mapping[str, Any]) -> Rule:
    """A copy of the rule with some options changed; errors as in `make_rule`."""
    return make_rule(rule_name(rule), {**rule_values(rule), **options})


def expected_angle(rule: Rule, weight: Tensor) -> float | None:
    """The angle between V and W, in degrees, that the rule's definition lets expect; None where it says
    nothing of it."""
    of = getattr(rule, "expected_angle", None)
    return None if of is None else float(of(weight))


def redrawn_by_updates(rule: Rule) -> bool:
    """Whether the rule's parts are drawn anew after each update of W."""
    return getattr(rule, "redraw", "never") == "update"


def _same_class(a: type, b: type) -> bool:
    """Whether two classes come from one definition, which a notebook may have run twice."""
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _options(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """A rule's fields by the names that they have as options."""
    return {f.metadata.get("option", f.name): f for f in dataclasses.fields(cls) if f.init}


def _as_fields(mode: str, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    fields = _options(cls)
    unknown = [name for name in options if name not in fields]
    if unknown:
        has = f"it has {', '.join(fields)}{nearest(unknown[0], fields)}" if fields else "it has none"
        raise TypeError(f"mode {mode!r} has no option {', '.join(map(repr, unknown))}; {has}")
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    lacking = [name for name in required if name not in options]
    if lacking:
        raise TypeError(f"mode {mode!r} needs the option {', '.join(map(repr, lacking))}")
    return {fields[name].name: value for name, value in options.items()}


def _check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not low <= float(value) <= high or math.isinf(value):
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"finite and at least {low:g}"
        raise ValueError(f"{name} must be {limits}, not {value!r}")


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}")


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm, summed in float32 at least."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return norm


@register_rule("symmetric")
@dataclass(frozen=True)
class Symmetric:
    """V = W: exact backprop through the same machinery."""

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        return {}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return weight

    def expected_angle(self, weight: Tensor) -> float:
        return 0.0


@register_rule("sign")
@dataclass(frozen=True)
class Sign:
    """V = scale * (M o sign(W) o S), the sign that of today's W (Liao, Leibo and Poggio 2016, generalised).

    Args:
        concordance: the probability, 0 to 1, that an entry of S is +1. The paper's p is 1 - concordance.
        magnitude: M: "random" from U[0, 1], "uniform" 1, "weight" abs(W).
        redraw: M and S are drawn once ("never") or after each update of W ("update").
        scale: "norm" gives V the Frobenius norm that W has when V is used (Moskovitz et al. 2018, for
            magnitude "uniform"; an all-zero W has V = 0), "fan_in" divides by the number of weights that
            feed one output unit, None is 1, a number is itself.
    """

    concordance: float = 1.0
    magnitude: Magnitude = "random"
    redraw: Redraw = "never"
    scale: Literal["norm", "fan_in"] | float | None = "norm"

    def __post_init__(self) -> None:
        _check_number("concordance", self.concordance, 0, 1)
        _check_choice("magnitude", self.magnitude, Magnitude)
        _check_choice("redraw", self.redraw, Redraw)
        if isinstance(self.scale, str):
            _check_choice("scale", self.scale, Literal["norm", "fan_in"])
        elif self.scale is not None:
            _check_number("scale", self.scale, 0)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if self.magnitude == "random":
            parts["M o S"] = rng.uniform(weight, "magnitude").to(weight.dtype)
        if self.concordance < 1:
            opposed = rng.uniform(weight, "sign") >= self.concordance
            magnitude = parts.get("M o S")
            if magnitude is None:
                magnitude = torch.ones_like(weight)
            parts["M o S"] = torch.where(opposed, -magnitude, magnitude)
        if self.scale == "fan_in":
            parts["scale"] = torch.tensor(1 / rng.layer.fan_in, dtype=weight.dtype, device=weight.device)
        return parts

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        # Each step in place: where weights are large, most of the time would go into new memory.
        v = weight.clone() if self.magnitude == "weight" else torch.sign(weight)
        if "M o S" in parts:
            v.mul_(parts["M o S"])
        if self.scale == "norm":
            norm = _norm(v)
            v.mul_(torch.where(norm > 0, _norm(weight) / norm, norm).to(v.dtype))
        elif self.scale is not None:
            v.mul_(parts["scale"] if self.scale == "fan_in" else self.scale)
        return v

    def expected_angle(self, weight: Tensor) -> float:
        """By the means over the random parts and the nonzero entries of W, with c the concordance: the
        cosine is (2c - 1) times E(M) / sqrt(E(M^2)) = sqrt(3)/2 for random magnitudes, times
        mean(|W|) / sqrt(mean(W^2)) unless M is |W|. NaN where V is all zero."""
        w = weight.detach().cpu().abs().double()
        w = w[w != 0]
        if not w.numel() or self.scale == 0:
            return math.nan
        cosine = 2 * self.concordance - 1
        if self.magnitude != "weight":
            cosine *= float(w.mean() / w.square().mean().sqrt())
        if self.magnitude == "random":
            cosine *= math.sqrt(3) / 2
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


@register_rule("random")
@dataclass(frozen=True)
class Random:
    """V normal with mean 0, independent of W: feedback alignment (Lillicrap et al. 2016).

    Args:
        std: standard deviation; None is 1/sqrt(3 fan_in), that of PyTorch's initial weights.
        redraw: drawn once ("never") or after each update of W ("update").
    """

    std: float | None = None
    redraw: Redraw = "never"

    def __post_init__(self) -> None:
        if self.std is not None:
            _check_number("std", self.std, 0)
        _check_choice("redraw", self.redraw, Redraw)

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        std = 1 / math.sqrt(3 * rng.layer.fan_in) if self.std is None else self.std
        return {"V": rng.normal(weight).mul_(std).to(weight.dtype)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["V"]

    def expected_angle(self, weight: Tensor) -> float:
        return 90.0


@register_rule("tensor")
@dataclass(frozen=True, eq=False)
class Given:
    """V as the user gives it.

    Args:
        tensors: option `feedback`: a tensor for each patched layer, by the layer's full name, in the layout
            of its weight.
    """

    # The option's name in `patch` is that of the method below, so the field has another.
    tensors: Mapping[str, Tensor] = field(metadata={"option": "feedback"})

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping):
            raise TypeError(f"feedback must map layer names to tensors, not {type(self.tensors).__name__}")
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"feedback[{name!r}] must be a tensor, not {type(tensor).__name__}")

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Raises ValueError unless there is a tensor of the right shape for each layer, and no other."""
        shapes = {layer.name: layer.shape for layer in layers}
        missing, unknown = shapes.keys() - self.tensors.keys(), self.tensors.keys() - shapes.keys()
        if missing:
            raise ValueError(f"feedback lacks a tensor for: {', '.join(sorted(missing))}")
        if unknown:
            raise ValueError(f"feedback names what is no patched layer: {', '.join(sorted(unknown))}")
        for name, shape in shapes.items():
            if tuple(self.tensors[name].shape) != shape:
                found = tuple(self.tensors[name].shape)
                raise ValueError(f"feedback[{name!r}] has shape {found}; the weight has {shape}")

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        return {"V": self.tensors[rng.layer.name].detach().to(weight)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["V"]


# The paper's own rules (Liao, Leibo and Poggio 2016), each a choice of options of the rules above.


@register_rule("uSF")
@dataclass(frozen=True)
class UniformSign(Sign):
    """uSF: V = sign(W)."""

    concordance: float = field(default=1.0, init=False)
    magnitude: Magnitude = field(default="uniform", init=False)
    redraw: Redraw = field(default="never", init=False)
    scale: Literal["norm", "fan_in"] | float | None = field(default=None, init=False)


@register_rule("NuSF")
@dataclass(frozen=True)
class NormalizedUniformSign(UniformSign):
    """NuSF: V = sign(W) / fan_in."""

    scale: Literal["norm", "fan_in"] | float | None = field(default="fan_in", init=False)


@register_rule("frSF")
@dataclass(frozen=True)
class FixedRandomSign(Sign):
    """frSF: V = M o sign(W) o S, M and S drawn once; the sign is that of today's W."""

    magnitude: Magnitude = field(default="random", init=False)
    redraw: Redraw = field(default="never", init=False)
    scale: Literal["norm", "fan_in"] | float | None = field(default=None, init=False)


@register_rule("brSF")
@dataclass(frozen=True)
class BatchwiseRandomSign(FixedRandomSign):
    """brSF: as frSF, with M and S drawn anew after each update of W."""

    redraw: Redraw = field(default="update", init=False)


@register_rule("RndF")
@dataclass(frozen=True)
class RandomFeedback(Random):
    """RndF: V from N(0, 0.05^2), drawn once."""

    std: float | None = field(default=0.05, init=False)
    redraw: Redraw = field(default="never", init=False)
