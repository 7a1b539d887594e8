"""What keeps exact backprop from going unnoticed: the hook on each weight, and checks of calls."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackhook.edge import Layer
from feedbackhook.products import Call
from feedbackhook.targets import kind_of

if TYPE_CHECKING:
    from feedbackhook.bracket import Bracket

_GRAPH_NODES = 64  # so far back the origin of a weight that belongs to no layer is searched
_ACTIVATIONS = {"FeedbackEdgeBackward", "AddmmBackward0", "LinearBackward0", "ConvolutionBackward0"}
"""Nodes of layers' outputs: what was computed from them is data, not a form of the layers' weights."""

MATRIX_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    torch.tensordot,
    F.bilinear,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.addmm,
    Tensor.baddbmm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}
"""Functions that may send an error signal through a weight without being rerouted."""


class ExactGradientError(RuntimeError):
    """A patched weight got a gradient from a call that no bracket saw, so that its error signal was exact."""


class Guard:
    """The hook on a weight: its gradient must come from a bracketed call."""

    def __init__(self, bracket: Bracket, layer: Layer) -> None:
        self._bracket, self._layer = weakref.ref(bracket), weakref.ref(layer)

    def __call__(self, gradient: Tensor) -> None:
        bracket, layer = self._bracket(), self._layer()
        if bracket is None or layer is None or not bracket.enabled or bracket.exact:
            return
        if not layer.was_bracketed():
            again = ""
            if forget_compiled_code():
                again = (
                    ". If the model is compiled: code that was made for a model without a patch may have "
                    "been used; it is forgotten now, so run the step again"
                )
            raise ExactGradientError(
                f"the weight of {layer.info.name!r} got a gradient from a call that the patch did not see: "
                "it was used outside the forward of every patched module and their ancestors, in a function "
                "that cannot be rerouted, or while the patch was disabled, so its error signal went through "
                f"W. Ways out: exclude={[layer.info.name]} in feedbackhook.patch, or `with patch.exact():` "
                f"around a backward that is meant to be exact{again}"
            )


def forget_compiled_code() -> bool:
    """Lets `torch.compile` make its code anew, and see from now on whether a module has hooks: else code
    that was made before hooks came or went would be used on, and that of a plain model for a patched one of
    the same classes. True where the compiler is in use, and did not look at hooks before."""
    if "torch._dynamo" not in sys.modules:
        return False
    blind: bool = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()
    return blind


def refuse_product(bracket: Bracket, func: Any, args: tuple[Any, ...]) -> None:
    """Raises if a function that is not rerouted multiplies a patched weight with what has an upstream."""
    tensors = [arg for arg in _flatten(args) if isinstance(arg, Tensor)]
    layers = [bracket.known(tensor if tensor._base is None else tensor._base) for tensor in tensors]
    layer = next((layer for layer in layers if layer is not None), None)
    others = (tensor for tensor, known in zip(tensors, layers, strict=True) if known is None)
    if bracket.enabled and layer is not None and any(other.requires_grad for other in others):
        raise ExactGradientError(
            f"the weight of {layer.info.name!r} is used in {_name(func)}, which cannot be rerouted: its "
            f"error signal would go through W. Use F.linear, or exclude={[layer.info.name]} in "
            "feedbackhook.patch"
        )


def refuse_derived(bracket: Bracket, func: Any, call: Call) -> None:
    """Raises if a weight that belongs to no layer is derived from a patched one."""
    known = (bracket.known(leaf) for leaf in _origins(call.weight))
    layer = next((layer for layer in known if layer is not None), None)
    if bracket.enabled and layer is not None and call.input.requires_grad:
        raise ExactGradientError(
            f"{_name(func)} uses a weight derived from that of {layer.info.name!r} outside its module's "
            "forward, and cannot be rerouted: its error signal would go through W. Derive it by "
            f"torch.nn.utils.parametrize, or exclude={[layer.info.name]} in feedbackhook.patch"
        )


def warn_of_exact(bracket: Bracket, func: Any, call: Call) -> None:
    """Warns, once for each function and shape, of a weight of the model that no patchable layer holds."""
    weight, name, shape = call.weight, _name(func), tuple(call.weight.shape)
    key = (name, shape, id(weight) if weight.is_leaf else None)
    if not (bracket.enabled and weight.requires_grad and call.input.requires_grad) or key in bracket.judged:
        return
    bracket.judged.add(key)
    layers = (module for root in bracket.roots for module in root.modules() if kind_of(module))
    held = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    own = {id(parameter) for root in bracket.roots for parameter in root.parameters()} - held
    if not any(id(leaf) in own for leaf in _origins(weight)):
        return  # a layer that was left exact on purpose, or another model's
    warnings.warn(
        f"{name} is called with a weight of shape {shape} that belongs to no layer which can be "
        "patched; its error signal stays exact",
        stacklevel=2,
    )


def _origins(weight: Tensor) -> Iterator[Tensor]:
    """The leaves from which a weight was computed, itself if it is one, as its graph tells."""
    if weight.is_leaf:
        yield weight
    nodes: list[Any] = [weight.grad_fn]
    seen: set[Any] = set()
    while nodes and len(seen) < _GRAPH_NODES:
        node = nodes.pop(0)
        if node is None or node in seen or node.name() in _ACTIVATIONS:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        nodes += [earlier for earlier, _ in node.next_functions]


def _flatten(args: Iterable[Any]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _flatten(arg)
        else:
            yield arg


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
