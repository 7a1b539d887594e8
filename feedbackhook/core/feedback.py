"""The feedback weight of one layer: its rule, its random parts, and what it has learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.learning import LearningRule, Local, MirrorRule, learns, reads_calls
from feedbackhook.core.torch_internals import is_wrapped, run_while_compiling, transformed
from feedbackhook.rng import CounterRNG, Streams


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

    A rule that learns has the methods of `LearningRule` (`feedbackhook.core.learning`) and need not have
    `draw`.
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

    Attributes:
        learned: the learned tensors by name, in the dtype and on the device of the stored weight; empty if
            the rule does not learn.
        updates: number of updates of W, for rules that learn every few updates.
        mirrored: number of steps of the mirror phase, from which its noise follows.
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
        self._streams = Streams()
        self._parts: dict[str, Tensor] | None = None
        self._drawn_for: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self.learned: dict[str, nn.Parameter] = {}
        self.updates = 0
        self.mirrored = 0

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        """Return V, detached, in the layout and dtype and on the device of `weight`.

        Raises:
            ValueError: the rule returns a V of another shape.
        """
        if not self.learned:
            self.learn(weight)
        return self.of(weight.detach())

    def of(self, weight: Tensor, learned: Sequence[Tensor] | None = None) -> Tensor:
        """Return V for a detached weight. Gradients must be disabled.

        Args:
            weight: W.
            learned: the learned tensors in their order; None: as they are now.
        """
        named = self._named(self.learned.values() if learned is None else learned)
        return _made(self.rule, self.layer.name, {**self.parts(weight), **named}, weight)

    def gradients(self, local: Local, weight: Tensor, learned: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the learned tensors from one call, in their order."""
        return _gradients(self.rule, self.layer.name, local, self.parts(weight), self._named(learned))

    def _named(self, learned: Iterable[Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in zip(self.learned, learned, strict=True)}

    def bound(self, weight: Tensor) -> Bound:
        """Return `of` and `gradients` with the current rule and random parts, which later changes do not
        affect."""
        rule, draws, names = self.rule, self.draws, tuple(self.learned)
        if self.recompute:
            return Bound(rule, self.layer.name, lambda w: self._draw(rule, w, draws), names)
        parts = self.parts(weight)
        return Bound(rule, self.layer.name, lambda w: parts, names)

    def learn(self, weight: Tensor) -> None:
        """Make the learned tensors, if the rule has any, in the dtype and on the device of the stored weight.

        If they exist, they are moved there, as parameters of the model are; those that were on the meta
        device are made again.
        """
        if not learns(self.rule):
            return
        dtype, device = weight.dtype, weight.device
        if self.learned and not any(p.is_meta and device.type != "meta" for p in self.learned.values()):
            for parameter in self.learned.values():
                if parameter.device != device or parameter.dtype != dtype:
                    parameter.data = parameter.data.to(device, dtype)
                    if parameter.grad is not None:
                        parameter.grad.data = parameter.grad.data.to(device, dtype)
            return
        rng = CounterRNG(self.seed, self.layer, 0, self.fused)
        with torch.no_grad():
            start = self.rule.initial(weight.detach(), rng)
        trained = reads_calls(self.rule)
        self.learned = {
            name: nn.Parameter(tensor.detach().to(device, dtype).clone(), requires_grad=trained)
            for name, tensor in start.items()
        }

    @torch.no_grad()
    def mirror(self, weight: Tensor, steps: int) -> None:
        """Run steps of the rule's mirror phase on a detached weight. Each draws noise of its own."""
        rule = cast(MirrorRule, self.rule)
        for _ in range(steps):
            rng = CounterRNG(self.seed, self.layer, self.mirrored, self.fused)
            named = self._named(self.learned.values())
            for name, value in rule.mirror(weight, {**self.parts(weight), **named}, rng).items():
                self.learned[name].copy_(value)
            self.mirrored += 1

    def restore(self, learned: Mapping[str, Tensor], updates: int, mirrored: int) -> None:
        """Set what was learned to stored values, in place if the tensors have these shapes."""
        self.updates, self.mirrored = updates, mirrored
        if {name: p.shape for name, p in self.learned.items()} != {n: t.shape for n, t in learned.items()}:
            self.learned = {
                name: nn.Parameter(tensor.detach().clone(), requires_grad=reads_calls(self.rule))
                for name, tensor in learned.items()
            }
            return
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(learned[name])

    def parts(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Return the random parts for a weight of this shape, dtype and device, drawing them if needed."""
        if self.recompute or redrawn_by_updates(self.rule):
            self._move_draw_count(weight.device)
            if torch.compiler.is_compiling():
                # Part of the graph instead of a constant: each run of the compiled code reads the draw count.
                return self._draw(self.rule, weight, self._count)
        if self.recompute:
            return self._draw(self.rule, weight, self.draws)
        wanted = (weight.shape, weight.dtype, weight.device)
        if self._parts is None or self._drawn_for != wanted:
            self._parts = self._draw(self.rule, weight, self.draws)
            self._drawn_for = wanted
        return self._parts

    @run_while_compiling
    def _move_draw_count(self, device: torch.device) -> bool:
        """Move the draw count to the weight's device.

        A graph that reads it from the CPU is no CUDA graph, and crashes on a GPU in PyTorch 2.11.
        """
        if device.type != "meta":
            self._count = self._count.to(device)
        return True

    @torch.no_grad()
    def _draw(self, rule: Rule, weight: Tensor, count: int | Tensor) -> dict[str, Tensor]:
        if transformed() and is_wrapped(weight):
            # One draw for all members of an ensemble, as a tensor that outlives the transform. There is no
            # single weight here, so a rule that draws by the weight's values gets NaN.
            weight = torch.full(weight.shape, torch.nan, dtype=weight.dtype, device=weight.device)
        if not callable(getattr(rule, "draw", None)):
            return {}  # a rule that learns may have no random parts
        if torch.compiler.is_compiling():
            return rule.draw(weight, self._rng(count))
        self._streams.asked.clear()
        parts = rule.draw(weight, self._rng(count))
        self._streams.ready.clear()
        return parts

    def _rng(self, count: int | Tensor) -> CounterRNG:
        return CounterRNG(self.seed, self.layer, count, self.fused, self._streams)

    def next_draw(self) -> tuple[CounterRNG, torch.device] | None:
        """Return the random numbers of the draw that is due, and their device; None if none is due, or if
        the numbers that it takes are not known, since the draw before was not needed."""
        if self._parts is not None or self._drawn_for is None or self.recompute:
            return None
        return self._rng(self.draws), self._drawn_for[2]

    def redraw(self) -> None:
        """Advance to the next draw, which happens when V is next needed."""
        self.draws += 1
        self._count.fill_(self.draws)
        if self._parts is None:
            self._streams.asked.clear()  # the last draw was not needed, so the next may not be either
        self._parts = None
        self._streams.ready.clear()

    def describe(self, layer: LayerInfo) -> None:
        """Draw the random parts again for a layer of another shape. They follow from the same name."""
        self.layer = dataclasses.replace(layer, name=self.layer.name)
        self._parts = self._drawn_for = None
        self._streams = Streams()

    def like(self, rule: Rule, seed: int, draws: int, drawn_as: str | None = None) -> Feedback:
        """Return a feedback of the same layer that keeps and draws its random parts in the same way.

        Args:
            rule: how V is computed.
            seed: as in the constructor.
            draws: as in the constructor.
            drawn_as: the layer name that the random parts follow from; None is the layer's current one.
        """
        layer = self.layer if drawn_as is None else dataclasses.replace(self.layer, name=drawn_as)
        other = Feedback(rule, layer, seed, draws, self.recompute, self.fused)
        if type(rule) is type(self.rule):
            other.learned, other.updates, other.mirrored = self.learned, self.updates, self.mirrored
        return other

    def copy(self) -> Feedback:
        """Return a feedback with the same random parts, and with copies of the learned tensors."""
        other = self.like(self.rule, self.seed, self.draws, self.layer.name)
        other.learned = {
            name: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for name, p in self.learned.items()
        }
        return other

    def follow(self, rule: Rule) -> None:
        """Change the rule. The draw count stays, so parts that both rules draw alike stay the same; what was
        learned stays if the rule is of the same class."""
        if type(rule) is not type(self.rule):
            self.learned, self.updates, self.mirrored = {}, 0, 0
        self.rule = rule
        self._parts = None


class Bound:
    """V and the gradients of the learned tensors, with the rule and the random parts of one forward.

    Args:
        rule: the rule.
        layer: the layer's name.
        parts: returns the random parts for a weight.
        names: the names of the learned tensors.
    """

    def __init__(
        self,
        rule: Rule,
        layer: str,
        parts: Callable[[Tensor], Mapping[str, Tensor]],
        names: Sequence[str] = (),
    ) -> None:
        self.rule = rule
        self._layer, self._parts, self._names = layer, parts, names

    def of(self, weight: Tensor, learned: Sequence[Tensor] = ()) -> Tensor:
        """Return V for a detached weight and the learned tensors of the forward."""
        parts = self._parts(weight)
        if learned:
            parts = {**parts, **dict(zip(self._names, learned, strict=True))}
        return _made(self.rule, self._layer, parts, weight)

    def gradients(self, local: Local, weight: Tensor, learned: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the learned tensors from one call, in their order."""
        named = dict(zip(self._names, learned, strict=True))
        return _gradients(self.rule, self._layer, local, self._parts(weight), named)


def _made(rule: Rule, layer: str, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    v = rule.feedback(weight, parts)
    if v.shape != weight.shape:
        raise ValueError(
            f"{type(rule).__name__} returned a feedback weight of shape {tuple(v.shape)} for {layer!r}, "
            f"whose weight has shape {tuple(weight.shape)}"
        )
    return v


def _gradients(
    rule: Rule, layer: str, local: Local, parts: Mapping[str, Tensor], learned: Mapping[str, Tensor]
) -> list[Tensor]:
    found = cast(LearningRule, rule).local_gradient(local, {**parts, **learned})
    shapes = {name: tuple(g.shape) for name, g in found.items()}
    expected = {name: tuple(t.shape) for name, t in learned.items()}
    if shapes != expected:
        raise ValueError(
            f"{type(rule).__name__}.local_gradient returned gradients of the shapes {shapes} for {layer!r}, "
            f"whose learned tensors have the shapes {expected}"
        )
    return [found[name] for name in learned]
