"""What happens to one call of a watched function: it is rerouted, followed, refused, or left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackhook.core.audit import mark_as_layer, nodes_behind
from feedbackhook.core.coverage import Coverage
from feedbackhook.core.edge import join
from feedbackhook.core.errors import exact_use
from feedbackhook.core.layer import Layer
from feedbackhook.core.learning import reads_calls
from feedbackhook.core.mode import Mode
from feedbackhook.core.operations import COPYING, OPERATIONS, Call
from feedbackhook.core.projection import Attention, Place, Projection
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import (
    base_of,
    multi_head_attention,
    requires_grad,
    saves_through_hooks,
    transformed,
)
from feedbackhook.core.weights import Use, Weights, alias, note_copy


class Calls:
    """The handler of a patch's function modes.

    A call that uses a patched weight runs on the detached input, so that PyTorch's own backward computes only
    the weight and bias gradients. The feedback edge then joins its output to the input.

    Args:
        state: the patch's.
        weights: finds the layer that a tensor belongs to.
        coverage: reports what is not rerouted.
        follow_checkpoint: makes a running checkpoint recompute under a mode like the given one.
    """

    def __init__(
        self,
        state: PatchState,
        weights: Weights,
        coverage: Coverage,
        follow_checkpoint: Callable[[Mode], None],
    ) -> None:
        self._state = state
        self._weights = weights
        self._coverage = coverage
        self._follow_checkpoint = follow_checkpoint

    def handle(self, mode: Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of a watched function."""
        eager = not torch.compiler.is_compiling()
        read = OPERATIONS.get(func)
        if read is None or not torch.is_grad_enabled():
            return self._other_call(mode, func, args, kwargs, eager)
        call = read(*args, **kwargs)
        use = self._use_of(call.weight, mode, eager)
        if use is not None:
            if eager and self._is_of_weights(use.layer, call.input, mode):
                return func(*args, **kwargs)
            return self._reroute(mode, use, call, func, args, kwargs, eager)
        if eager:
            self._refuse_product(mode, func, (call.input, call.weight))
        input_requires_grad = requires_grad(call.input)
        if eager and input_requires_grad:
            self._coverage.warn_of_unknown_weight(func.__name__, call.weight)
        output = func(*args, **kwargs)
        if eager and not input_requires_grad:
            mark_as_layer(output)
        return output

    def _other_call(
        self, mode: Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], eager: bool
    ) -> Any:
        """Run a call that is not rerouted: it copies, multiplies matrices, contains other calls, or builds no
        graph."""
        if func in COPYING:
            copy = func(*args, **kwargs)
            if eager and args and isinstance(args[0], Tensor):
                use = self._weights.find(args[0], mode.copies)
                if use is None and not args[0].requires_grad:
                    use = self._alias(args[0], mode)
                if use is not None:
                    note_copy(use, copy, mode.copies, func, args, kwargs)
            return copy
        if not torch.is_grad_enabled():
            if eager:
                self._follow_checkpoint(mode)
        elif func is F.multi_head_attention_forward:
            query: Tensor = args[0] if args else kwargs["query"]
            before, mode.attention = mode.attention, _attention_of(query, mode)
            try:
                with mode:
                    return multi_head_attention(*args, **kwargs)
            finally:
                mode.attention = before
        elif eager:
            self._refuse_product(mode, func, (*args, *kwargs.values()))
        return func(*args, **kwargs)

    def _use_of(self, weight: Tensor, mode: Mode, eager: bool) -> Use | None:
        """Return the patched layer that a weight in a call belongs to.

        A parameter belongs to its layer wherever it is used, and so do its views (attention uses a third of
        its projection at a time), its copies and its aliases. A weight derived from parameters (standardized,
        normalized, parametrized) belongs to the module whose forward is running, unless the graph tells that
        it comes from others.
        """
        if (use := self._weights.find(weight, mode.copies)) is not None:
            return use
        layer = self._state.own.get(mode.running[-1].mark.path)
        if layer is not None and layer.may_derive(weight) and not (eager and _is_of_others(weight, layer)):
            return Use(layer, weight)
        return self._alias(weight, mode) if eager else None

    def _is_of_weights(self, layer: Layer, input: Tensor, mode: Mode) -> bool:
        """Whether a call of a layer's weight is on another weight, as in a penalty or where two are merged.

        If the layer itself is running, another layer's weight is data that it is applied to.
        """
        source = self._weights.find(input, mode.copies)
        running = self._state.own.get(mode.running[-1].mark.path)
        return source is not None and (source.layer is layer or running is not layer)

    def _alias(self, tensor: Tensor, mode: Mode) -> Use | None:
        """Return the weight that a tensor shares memory with, if there is one."""
        if mode.memory is None:
            mode.memory = self._weights.memory()
        return alias(tensor, mode.memory)

    def _reroute(
        self,
        mode: Mode,
        use: Use,
        call: Call,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        eager: bool,
    ) -> Tensor:
        layer = use.layer
        input_requires_grad = requires_grad(call.input)
        feedback = layer.feedback
        if not eager:
            if isinstance(feedback, Projection):
                raise RuntimeError(NO_COMPILE.format(layer.info.name))
            layer.compiled = True
            layer.check_source(use.weight)
            feedback.parts(use.weight)  # draw them here, since a traced backward can keep nothing
        else:
            _refuse_kind(layer, call)
            layer.prepare(use.weight)
            layer.use(use.weight)
            if saves_through_hooks():
                self._follow_checkpoint(mode)
            if layer.depth is None:
                layer.depth = sum(other.depth is not None for other in self._state.patched)
            layer.calls += 1
            layer.input_requires_grad = layer.input_requires_grad or input_requires_grad
        if not input_requires_grad or not self._state.enabled:
            output: Tensor = func(*args, **kwargs)
            if eager:
                self._tell(layer, call.input, output)
                if output.requires_grad:
                    self._note_arrival(layer, output, exact=input_requires_grad)
            return output
        delivery = None
        if isinstance(feedback, Projection):
            assert mode.forward is not None
            like = call.input.new_empty(0, dtype=use.weight.dtype)
            delivery = mode.forward.site(layer, feedback, _place_of(call, mode), like)
        learned = list(feedback.learned.values())
        if learned and eager:
            _refuse_to_learn(layer, call)
        output = call.run(func, args, kwargs, call.input.detach())
        if eager:
            self._tell(layer, call.input, output)
        return join(output, call.input, use, self._state, call, delivery, *learned)

    def _tell(self, layer: Layer, input: Tensor, output: Tensor) -> None:
        for listener in list(self._state.call_listeners.values()):
            listener(layer, input.detach(), output.detach())

    def _note_arrival(self, layer: Layer, output: Tensor, exact: bool) -> None:
        """Record an error signal that arrives at an output that is not rerouted, because the input requires
        no gradient or because the patch is disabled (`exact`)."""
        shape = None if output.is_nested else output.shape

        def arrived(error: Tensor) -> None:
            self._state.arrivals.note(layer)
            if layer.probes and not exact:
                layer.probe(None, error if shape is None else error.reshape(shape))

        if not exact:
            mark_as_layer(output)
        # An in-place activation gives a view a new node, which would leave the hook behind.
        base = base_of(output)
        (output if base is None else base).register_hook(arrived)

    def _refuse_product(self, mode: Mode, func: Any, args: tuple[Any, ...]) -> None:
        """Raise if a function that is not rerouted multiplies a patched weight by a tensor that requires a
        gradient."""
        tensors = [arg for arg in _flatten(args) if isinstance(arg, Tensor)]
        if not self._state.enabled or not any(tensor.requires_grad for tensor in tensors):
            return
        uses = [self._weights.find(tensor, mode.copies) for tensor in tensors]
        others = [tensor for tensor, own in zip(tensors, uses, strict=True) if own is None]
        if not any(other.requires_grad for other in others):
            return
        uses += [self._alias(other, mode) for other in others if not other.requires_grad]
        if (use := next((use for use in uses if use is not None), None)) is not None:
            raise exact_use(use.layer.info.name, str(getattr(func, "__name__", func)))


def _is_of_others(weight: Tensor, layer: Layer) -> bool:
    """Whether the graph tells that a weight was computed from another matrix, without the layer's own one.

    If there is no matrix in the graph, the layer's own may have been detached and scaled.
    """
    plain = layer.targets[0].place.parameter()
    if plain is None or not plain.requires_grad or weight.grad_fn is None or transformed():
        return False
    matrix = False
    for node in nodes_behind([weight.grad_fn]):
        leaf = getattr(node, "variable", None)
        if leaf is plain or (plain.grad_fn is not None and node is plain.grad_fn):
            return False
        matrix = matrix or (leaf is not None and sum(size > 1 for size in leaf.shape) > 1)
    return matrix


def _place_of(call: Call, mode: Mode) -> Place:
    """Return where the input of a call has its batch and its features."""
    # A linear layer's input has at least two, if there is a batch, also for a single row of its weight.
    dims = max(2, call.weight.dim())
    shape = tuple(call.input.shape)
    return Place(shape, len(shape) >= dims, dims > 2, mode.attention)


def _attention_of(query: Tensor, mode: Mode) -> Attention | None:
    """Return where the batch is inside a call of `F.multi_head_attention_forward`."""
    if query.dim() != 3:
        return Attention(len(query), 1, True)  # it adds a batch of one
    batch_first = bool(getattr(mode.running[-1].module, "batch_first", False))
    return Attention(query.shape[0], query.shape[1], batch_first)


NO_COMPILE = (
    "direct feedback to {0!r} needs the output's gradient, which compiled code does not show to Python: run "
    "the model uncompiled"
)


def _refuse_kind(layer: Layer, call: Call) -> None:
    """Raise if the edge cannot handle a call's kind of tensor."""
    if type(call.weight) is not nn.Parameter and hasattr(call.weight, "device_mesh"):
        raise RuntimeError(
            f"the weight of {layer.info.name!r} is sharded while it is used (a DTensor, as in tensor "
            f"parallelism), but V is not; pass exclude={[layer.info.name]} to feedbackhook.patch"
        )
    if call.input.is_nested and isinstance(layer.feedback, Projection):
        raise RuntimeError(
            f"the input of {layer.info.name!r} is a nested tensor, so direct feedback cannot tell its "
            f"samples apart; pad it, or pass exclude={[layer.info.name]} to feedbackhook.patch"
        )
    if call.input.is_nested and call.input.layout is torch.strided:
        raise RuntimeError(
            f"the input of {layer.info.name!r} is a nested tensor with strided layout, which "
            "torch.autograd.Function does not support; create it with layout=torch.jagged, or pass "
            f"exclude={[layer.info.name]} to feedbackhook.patch"
        )


def _refuse_to_learn(layer: Layer, call: Call) -> None:
    """Raise if learned feedback cannot learn from such a call."""
    name = layer.info.name
    if transformed() and reads_calls(layer.feedback.rule):
        raise RuntimeError(
            f"the feedback of {name!r} learns in backward(), and a transform of torch.func has none; set "
            "patch.enabled = False for it, or go on with V as it is: patch.freeze()"
        )
    if call.input.is_nested and reads_calls(layer.feedback.rule):
        raise RuntimeError(
            f"the input of {name!r} is a nested tensor, from which feedback cannot learn; pad it, or pass "
            f"exclude={[name]} to feedbackhook.patch"
        )


def _flatten(args: Iterable[Any]) -> Iterable[Any]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _flatten(arg)
        else:
            yield arg
