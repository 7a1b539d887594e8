"""One patched weight, and the edge that sends error signals back through its V."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from feedbackhook.core.feedback import Feedback
from feedbackhook.core.operations import Call
from feedbackhook.core.torch_internals import transformed
from feedbackhook.selection import LayerInfo, Target, full_shape, weight_of

if TYPE_CHECKING:
    from feedbackhook.core.interception import Bracket

Tap = Callable[[Tensor | None, Tensor], None]
"""(error signal at the input, or None where nothing lies upstream; error signal at the output)"""


class Layer:
    """One patched weight: the modules that hold it, its feedback, and what has happened to it.

    Args:
        targets: where the weight is; more than one where it is tied. The first names the layer.
        feedback: its V.

    Attributes:
        calls: forward calls with gradients enabled.
        rerouted: error signals sent through V.
        upstream: whether the input of any call required a gradient; None before the first call.
        derived: W as the last forward used it, where that is not the module's own weight.
        depth: its place, from 0, in the order of the forward's calls; None before the first call.
        compiled: whether a call was traced by torch.compile; then no Python runs in its backward.
        last_backward: the id of the last backward that reached a call; -1 before the first.
    """

    def __init__(self, targets: list[Target], feedback: Feedback) -> None:
        self.targets = targets
        self.feedback = feedback
        self.calls = 0
        self.rerouted = 0
        self.upstream: bool | None = None
        self.depth: int | None = None
        self.taps: OrderedDict[int, Tap] = OrderedDict()
        self.derived: Tensor | None = None
        self.compiled = False
        self.last_backward = -1

    @property
    def info(self) -> LayerInfo:
        """What a rule may know of it."""
        return self.targets[0].info

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight; of a tied one, the first."""
        return self.targets[0].module

    @property
    def names(self) -> list[str]:
        """The full names of the layer."""
        return [target.info.name for target in self.targets]

    def weight(self) -> Tensor:
        """Today's W, as the module's forward would use it; where that forward derives it from the module's
        weight (standardizes it, say), W as the last forward used it. A sharded weight is gathered, for which
        every rank must ask.

        Raises:
            RuntimeError: the module keeps integers, of which no forward has made a weight yet.
        """
        target = self.targets[0]
        weight = weight_of(target.module, target.attribute) if self.derived is None else self.derived
        if not weight.is_floating_point():
            raise RuntimeError(
                f"the weight of {self.info.name!r} is kept as {weight.dtype}, and V follows the weight that "
                "its forward makes of it: run a forward with gradients enabled first"
            )
        gather = getattr(weight, "full_tensor", None)  # torch.distributed's DTensor has it
        return weight if gather is None else gather()

    def check(self) -> None:
        """Sees that V can be made of such a weight.

        Raises:
            TypeError: it is sparse, or packed; the error names the layer.
        """
        name, plain = self.info.name, self.targets[0].parameter()
        way_out = f"exclude={[name]} in feedbackhook.patch leaves it with exact backprop"
        if plain is None:
            return
        if plain.layout is not torch.strided:
            raise TypeError(f"the weight of {name!r} is sparse ({plain.layout}), and V is dense; {way_out}")
        if plain.is_complex():
            raise TypeError(f"the weight of {name!r} is complex; feedback is defined for real weights")
        if not plain.is_floating_point() and tuple(plain.shape) != full_shape(self.module):
            raise TypeError(
                f"{name!r} keeps its weight packed, as {plain.dtype} of shape {tuple(plain.shape)}, which "
                f"its forward unpacks where the patch does not see it; {way_out}"
            )

    def has_weight(self) -> bool:
        """Whether `weight` has an answer already."""
        plain = self.targets[0].parameter()
        return self.derived is not None or plain is None or plain.is_floating_point()

    def use(self, weight: Tensor) -> None:
        """Notes what the forward uses as W, if that is not what `weight_of` would find."""
        plain = self.targets[0].parameter()
        self.derived = None if plain is None or plain is weight else weight.detach()

    def parameters(self) -> Iterator[Tensor]:
        """The weight, or the parameters from which the module derives it."""
        if (weight := self.targets[0].parameter()) is not None:
            yield weight
            return
        for name, parameter in self.module.named_parameters():
            if "bias" not in name.split("."):
                yield parameter

    def is_opaque(self) -> bool:
        """Whether its weight is no plain dense tensor, so that its module may compute out of sight."""
        weight = self.targets[0].parameter()
        return weight is not None and (not weight.is_floating_point() or type(weight) not in _PLAIN)

    def weight_type(self) -> str:
        """How the module keeps its weight, in words."""
        weight = self.targets[0].parameter()
        return f"{type(weight).__name__} of {getattr(weight, 'dtype', None)}"

    def may_derive(self, weight: Tensor) -> bool:
        """Whether a weight used in the module's own forward is its parameter, or derived from parameters."""
        own = not isinstance(weight, nn.Parameter) or self.targets[0].parameter() is weight
        return own and weight.shape == self.info.shape

    def tell(self, error_in: Tensor | None, error_out: Tensor) -> None:
        """Tells the probes of an error signal; `error_in` is None where nothing lies upstream."""
        for tap in list(self.taps.values()):
            tap(error_in, error_out)


_PLAIN = (Tensor, nn.Parameter)


class Part(Protocol):
    """What a call uses of a weight, and so of its V."""

    def of(self, v: Tensor) -> Tensor:
        """The same part of V."""


class View(NamedTuple):
    """A part of a contiguous weight: size, stride, and how far its first entry lies from the weight's."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def of(self, v: Tensor) -> Tensor:
        """The same part of V."""
        v = v.contiguous()
        return v.as_strided(self.size, self.stride, v.storage_offset() + self.offset)


class Copied(NamedTuple):
    """What a function made of a weight, or of a part of it, by nothing but choosing and ordering entries."""

    part: Part | None
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, v: Tensor) -> Tensor:
        """The same of V."""
        return self.function(v if self.part is None else self.part.of(v), *self.args, **self.kwargs)


class FeedbackEdge(torch.autograd.Function):
    """Joins a layer's output, made from the detached input, back to the input by V's product."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        part: Part | None,
        bracket: Bracket,
        layer: Layer,
        call: Call,
    ) -> Tensor:
        ctx.part, ctx.bracket, ctx.layer, ctx.product = part, bracket, layer, call.product
        # The graph keeps the V of its forward; a traced backward may keep nothing, and has today's.
        compiling = torch.compiler.is_compiling()
        ctx.feedback = layer.feedback.of if compiling else layer.feedback.bound(weight)
        ctx.dtype = input.dtype
        # The input only where PyTorch's own node keeps the very same, so that it takes no memory.
        keep = call.wants_input and call.weight.requires_grad and input.dtype == output.dtype
        ctx.save_for_backward(weight, input if keep else None)
        # Not `view_as`: an in-place activation on a view made inside a custom function raises.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, error_out: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _send_back(ctx, error_out)
        with torch.no_grad():  # the graph of this backward is wanted, but V's product is no derivative
            _, error_in, *nothing = _send_back(ctx, error_out)
        return error_out, _Last.apply(error_in, error_out), *nothing


def _send_back(ctx: Any, error_out: Tensor) -> tuple[Tensor | None, ...]:
    """The edge's backward: the error signal for the layer's own node, and V's product for the input."""
    weight, input = ctx.saved_tensors
    layer: Layer = ctx.layer
    exact = ctx.bracket.exact
    eager = not torch.compiler.is_compiling()
    error_in = _product(ctx, error_out, weight if exact else ctx.feedback(weight), input)
    if eager and ctx.bracket.observers and not exact:
        by_weight = _product(ctx, error_out, weight, input)
        for observe in ctx.bracket.observers:
            observe(layer, error_in, by_weight)
    if error_in.dtype != ctx.dtype:
        error_in = error_in.to(ctx.dtype)
    if eager:
        layer.rerouted += not exact
        ctx.bracket.backwards.arrived(layer)
        if layer.taps:
            layer.tell(error_in, error_out)
    return error_out, error_in, None, None, None, None, None


def _product(ctx: Any, error_out: Tensor, whole: Tensor, input: Tensor | None) -> Tensor:
    """That of the error signal with a weight: V or W, of which the call may have used a part."""
    used = whole if ctx.part is None else ctx.part.of(whole)
    if used.dtype != error_out.dtype:  # asked first, since `to` takes its time where nothing is to do
        used = used.to(error_out.dtype)
    error_in: Tensor = ctx.product(error_out, used, input)
    return error_in


class _Last(torch.autograd.Function):
    """The identity on an error signal that V made, which has no derivative with regard to anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(error_in: Tensor, error_out: Tensor) -> Tensor:
        return error_in.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            "a gradient was differentiated that went through feedback weights: V's product is no derivative "
            "of the forward, so it has none itself; set patch.enabled = False before the forward"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Last.backward(ctx, tangents[0])


class TransformableEdge(FeedbackEdge):
    """The same in the form that torch.func's transforms and forward mode ask for, which takes far longer to
    call (and which `torch.compile` does not trace)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        output: Tensor = inputs[0]
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        FeedbackEdge.forward(ctx, *inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            "forward-mode derivatives do not pass a patched layer whose input requires a gradient: they meet "
            "no error signal, so set patch.enabled = False for them"
        )


def join(*inputs: Any) -> Tensor:
    """Applies the feedback edge to the inputs of `FeedbackEdge.forward`."""
    joined: Tensor = (TransformableEdge if transformed() else FeedbackEdge).apply(*inputs)
    return joined
