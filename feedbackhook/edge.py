"""One patched weight, and the edge that sends error signals back through its V."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from feedbackhook.feedback import Feedback
from feedbackhook.products import Call
from feedbackhook.targets import Target, weight_of

if TYPE_CHECKING:
    from feedbackhook.bracket import Bracket

Tap = Callable[[Tensor | None, Tensor], None]
"""(error signal at the input, or None where nothing lies upstream; error signal at the output)"""


class Layer:
    """One patched weight: the module that holds it, its feedback, and what has happened to it.

    Attributes:
        names: the full names of the layer; more than one where the weight is tied.
        calls: forward calls with gradients enabled.
        rerouted: error signals sent through V.
        upstream: whether the input of any call required a gradient; None before the first call.
        derived: W as the last forward used it, where that is not the module's own weight.
        depth: its place, from 0, in the order of the forward's calls; None before the first call.
        last_backward: the id of the last backward that reached a bracketed call; -1 before the first.
    """

    def __init__(self, target: Target, feedback: Feedback) -> None:
        self.info = target.info
        self.names = [target.info.name]
        self.module = target.module
        self.attribute = target.attribute
        self.feedback = feedback
        self.calls = 0
        self.rerouted = 0
        self.upstream: bool | None = None
        self.depth: int | None = None
        self.taps: OrderedDict[int, Tap] = OrderedDict()
        self.derived: Tensor | None = None
        self.compiled = False  # whether a call was traced; then no Python runs in the backward
        self.last_backward = -1

    def weight(self) -> Tensor:
        """Today's W, as the module's forward would use it; where that forward derives it from the module's
        weight (standardises it, say), W as the last forward used it. A sharded weight is gathered, for which
        every rank must ask."""
        weight = weight_of(self.module, self.attribute) if self.derived is None else self.derived
        gather = getattr(weight, "full_tensor", None)  # torch.distributed's DTensor has it
        return weight if gather is None else gather()

    def use(self, weight: Tensor) -> None:
        """Notes what the forward uses as W, if that is not what `weight_of` would find."""
        plain = self.plain_weight()
        self.derived = None if plain is None or plain is weight else weight.detach()

    def plain_weight(self) -> Tensor | None:
        """The weight, where it is a parameter of the module; None where it is derived from others."""
        return self.module._parameters.get(self.attribute)

    def parameters(self) -> Iterator[Tensor]:
        """The weight, or the parameters from which the module derives it."""
        if (weight := self.plain_weight()) is not None:
            yield weight
            return
        for name, parameter in self.module.named_parameters():
            if "bias" not in name.split("."):
                yield parameter

    def arrived(self) -> None:
        """Notes that the backward now running has reached a bracketed call."""
        self.last_backward = torch._C._current_graph_task_id()

    def may_derive(self, weight: Tensor) -> bool:
        """Whether a weight used in the module's own forward is its parameter, or derived from parameters."""
        own = not isinstance(weight, nn.Parameter) or self.plain_weight() is weight
        return own and weight.shape == self.info.shape

    def error_signal(self, error_in: Tensor | None, error_out: Tensor) -> None:
        """Notes the same and tells the probes; `error_in` is None where nothing lies upstream."""
        self.arrived()
        if self.taps:
            for tap in list(self.taps.values()):
                tap(error_in, error_out)

    def was_bracketed(self) -> bool:
        """Whether the backward now running has reached a bracketed call of this weight, as far as can be
        told: a compiled backward tells nothing, so that a call that was traced must do."""
        return self.compiled or self.last_backward == torch._C._current_graph_task_id()


class View(NamedTuple):
    """A part of a contiguous weight: size, stride, and how far its first entry lies from the weight's."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def of(self, v: Tensor) -> Tensor:
        """The same part of V."""
        v = v.contiguous()
        return v.as_strided(self.size, self.stride, v.storage_offset() + self.offset)


class FeedbackEdge(torch.autograd.Function):
    """Joins a layer's output, made from the detached input, back to the input by V's product."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        view: View | None,
        bracket: Bracket,
        layer: Layer,
        call: Call,
    ) -> Tensor:
        ctx.view, ctx.bracket, ctx.layer, ctx.product = view, bracket, layer, call.product
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
    error_in = _product(ctx, error_out, weight if exact else layer.feedback.of(weight), input)
    if eager and ctx.bracket.observers and not exact:
        by_weight = _product(ctx, error_out, weight, input)
        for observe in ctx.bracket.observers:
            observe(layer, error_in, by_weight)
    if error_in.dtype != ctx.dtype:
        error_in = error_in.to(ctx.dtype)
    if eager:
        layer.rerouted += not exact
        layer.error_signal(error_in, error_out)
    return error_out, error_in, None, None, None, None, None


def _product(ctx: Any, error_out: Tensor, whole: Tensor, input: Tensor | None) -> Tensor:
    """That of the error signal with a weight: V or W, of which the call may have used a part."""
    used = whole if ctx.view is None else ctx.view.of(whole)
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
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    joined: Tensor = (TransformableEdge if transformed else FeedbackEdge).apply(*inputs)
    return joined
