"""The edges in the autograd graph that send error signals through V, or the output's error through B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from feedbackhook.core.feedback import Feedback
from feedbackhook.core.layer import Layer, Patched
from feedbackhook.core.learning import LearningRule, Local, Products, full_precision, reads_calls
from feedbackhook.core.operations import Call
from feedbackhook.core.signals import Delivery
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import transformed
from feedbackhook.core.weights import Use


class FeedbackEdge(torch.autograd.Function):
    """Joins a layer's output, computed from the detached input, to the input through V's product, or through
    what B delivers."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        input: Tensor,
        use: Use,
        state: PatchState,
        call: Call,
        delivery: Delivery | None,
        *learned: Tensor,
    ) -> Tensor:
        layer, weight, ctx.part = use
        ctx.state, ctx.layer, ctx.product = state, layer, call.product
        ctx.delivery, ctx.input_at = delivery, 1
        ctx.products = Products(call.product, call.apply, call.outer) if learned else None
        # The graph keeps the V of its forward. A traced backward can keep nothing, so it uses the current V.
        if isinstance(layer.feedback, Feedback):
            compiling = torch.compiler.is_compiling()
            ctx.feedback = layer.feedback if compiling else layer.feedback.bound(weight)
        ctx.dtype = input.dtype
        # Save the input only if PyTorch's own node saves the very same tensor, so that it takes no memory.
        keep = call.wants_input and call.weight.requires_grad and input.dtype == output.dtype
        ctx.hint = keep
        if learned:
            keep = keep or reads_calls(layer.feedback.rule)
            ctx.samples, ctx.updates = call.samples(), call.weight.requires_grad
        # Not detached, though no gradient goes there: second derivatives would, see `_not_differentiable`.
        ctx.save_for_backward(weight, input if keep else None, *learned)
        # Not `view_as`: an in-place activation on a view made inside a custom function raises.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _send_back(ctx, grad_output)
        with torch.no_grad():  # the graph of this backward is wanted, but V's product is not a derivative
            _, *others = _send_back(ctx, grad_output)
        weight, _, *learned = ctx.saved_tensors
        return grad_output, *(_not_differentiable(other, grad_output, weight, *learned) for other in others)


def _send_back(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return the error signal for the layer's own node, and V's product with it for the input."""
    weight, input, *learned = ctx.saved_tensors
    weight = weight.detach()
    layer: Layer = ctx.layer
    state: PatchState = ctx.state
    exact = state.exact
    eager = not torch.compiler.is_compiling()
    if ctx.delivery is None or exact:
        v = weight if exact else ctx.feedback.of(weight, learned)
        grad_input = _product(ctx, grad_output, v, input)
    else:
        grad_input = ctx.delivery.send()
    if eager and state.error_listeners and not exact:
        by_weight = _product(ctx, grad_output, weight, input)
        for listener in list(state.error_listeners.values()):
            listener(layer, grad_input, by_weight)
    if grad_input.dtype != ctx.dtype:
        grad_input = grad_input.to(ctx.dtype)
    if eager:
        layer.rerouted += not exact
        state.arrivals.note(layer)
        if layer.probes:
            layer.probe(grad_input, grad_output)
    gradients = _learn(ctx, grad_output, weight, input, learned) if learned else ()
    return grad_output, grad_input, None, None, None, None, *gradients


def _learn(
    ctx: Any, grad_output: Tensor, weight: Tensor, input: Tensor, learned: list[Tensor]
) -> list[Tensor | None]:
    """Return the local gradients of the layer's learned tensors."""
    if ctx.delivery is not None:
        return [ctx.delivery.gradient(input).to(learned[0].dtype) if ctx.needs_input_grad[-1] else None]
    rule: LearningRule = ctx.feedback.rule
    needed = ctx.needs_input_grad[-len(learned) :]
    frozen = rule.learns_from == "gradient" and not ctx.updates
    if frozen or not any(needed):
        return [None] * len(learned)
    dtype = learned[0].dtype
    name = f"{type(rule).__name__} of {ctx.layer.info.name!r}"
    local = Local(
        name, rule.learns_from, ctx.products, ctx.part, weight, input, grad_output, ctx.samples, dtype
    )
    with full_precision(weight.device):
        gradients = ctx.feedback.gradients(local, weight, learned)
    return [
        gradient.to(tensor.dtype) if wanted else None
        for gradient, tensor, wanted in zip(gradients, learned, needed, strict=True)
    ]


def _product(ctx: Any, grad_output: Tensor, whole: Tensor, input: Tensor | None) -> Tensor:
    """Return the error signal's product with a weight (V or W), of which the call may have used a part."""
    used = whole if ctx.part is None else ctx.part.of(whole)
    if used.dtype != grad_output.dtype:  # a call of `to` takes time even if there is nothing to do
        used = used.to(grad_output.dtype)
    grad_input: Tensor = ctx.product(grad_output, used, input if ctx.hint else None)
    return grad_input


def _not_differentiable(made: Tensor | None, *sources: Tensor) -> Tensor | None:
    """Return what a backward has made, so that differentiating it raises an error where backprop's gradient
    would have a derivative: with respect to the arriving error signal and the weight, for instance."""
    return None if made is None else _NotDifferentiable.apply(made, *sources)


class _NotDifferentiable(torch.autograd.Function):
    """The identity on what V or B has produced. It has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: Tensor, *sources: Tensor) -> Tensor:
        return made.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            "cannot differentiate a gradient that went through feedback: what V or B sends is not a "
            "derivative of the forward, so it has none itself; set patch.enabled = False before the forward"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _NotDifferentiable.backward(ctx, tangents[0])


class TransformableEdge(FeedbackEdge):
    """The same edge in the form that torch.func's transforms and forward mode need. It takes far longer to
    call, and `torch.compile` cannot trace it."""

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
            "forward-mode derivatives cannot pass a patched layer whose input requires a gradient, since "
            "there is no error signal; set patch.enabled = False for them"
        )


def join(*inputs: Any) -> Tensor:
    """Apply the feedback edge to the inputs of `FeedbackEdge.forward`."""
    joined: Tensor = (TransformableEdge if transformed() else FeedbackEdge).apply(*inputs)
    return joined


class SiteEdge(torch.autograd.Function):
    """The identity on a module's input, whose backward returns what B delivers instead of what arrives."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, state: PatchState, delivery: Delivery, *learned: Tensor) -> Tensor:
        ctx.state, ctx.dtype = state, input.dtype
        if learned:
            ctx.save_for_backward(input, *learned)
        ctx.delivery, ctx.input_at = delivery, 0
        return input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        site: Patched = ctx.delivery.patched
        state: PatchState = ctx.state
        grad_input = grad_output
        with torch.no_grad():
            if not state.exact:
                grad_input = ctx.delivery.send().to(ctx.dtype)
                for listener in list(state.error_listeners.values()):
                    listener(site, grad_input, grad_output)
        site.rerouted += not state.exact
        state.arrivals.note(site)
        if site.probes:
            site.probe(grad_input, grad_output)
        input, *learned = ctx.saved_tensors or (None,)
        with torch.no_grad():
            gradients = [ctx.delivery.gradient(input).to(b.dtype) for b in learned]
        if not torch.is_grad_enabled():
            return grad_input, None, None, *gradients
        if not state.exact:
            grad_input = _NotDifferentiable.apply(grad_input, grad_output, *learned)
        return grad_input, None, None, *(_not_differentiable(g, grad_output, *learned) for g in gradients)
