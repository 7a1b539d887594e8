"""The audit: what a graph does with the weights, whatever function has built it.

A list of functions passes what it does not hold. The graph of a forward does not: it is walked from its
roots to its leaves, and each node is told by what flows into it.

- *Activations*: the outputs of layers, of embeddings, and whatever was computed from them.
- *Weights*: a patched weight, or what was computed from it (transposed, normalized, masked, dequantized).

A node where a weight's path meets an activation multiplies an error signal by W, unless it is linear in
both (adds, joins, copies); after those, a node that squares what came of it does. So does a node that an
activation enters and that has saved a tensor which shares memory with W; that shows frozen weights, `.data`
and `.detach()`, whose path is not in the graph. Exempt are the feedback edge and the calls that the patch
rerouted, or that have nothing upstream (`mark_as_layer`).

The same meeting with a matrix that no layer holds is a finding too, of another kind: it cannot be patched.
Scales are not: there an elementwise function, such as a normalization's, meets the activation.

Out of sight are a frozen weight through a copy or through hooks on saved tensors (a non-reentrant checkpoint
has some, `save_on_cpu` too), and compiled code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from feedbackhook.core.torch_internals import Node, levels, saved_tensors, sequence_number, storage_of

MARK = "feedbackhook"
"""The key in the metadata of a node that says: this is a layer's output."""

_EDGES = re.compile(r"FeedbackEdge|TransformableEdge|ApplyTemplate")  # the last is what dynamo makes of one
_LOOK_UPS = {"Embedding", "EmbeddingBag", "EmbeddingSparse", "EmbeddingDense"}
_LINEAR = {
    "Add", "Sub", "Rsub", "Cat", "Stack", "Where", "SWhere", "Copy", "CopySlices", "IndexPut", "IndexPutImpl",
    "IndexAdd", "IndexCopy", "MaskedFill", "MaskedScatter", "Scatter", "ScatterAdd", "SelectScatter",
    "SliceScatter", "ForeachAdd", "ForeachSub",
}  # fmt: skip
"""Nodes that are linear in all that enters them: an error signal passes them without meeting a weight."""
_ELEMENTWISE = {
    "Mul", "Div", "Addcmul", "Addcdiv", "Pow", "Prelu", "Maximum", "Minimum", "Lerp", "PreluKernel",
    "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm",
    "FusedRmsNorm",
}  # fmt: skip
_REDUCTIONS = {
    "Sum", "Mean", "Norm", "LinalgVectorNorm", "LinalgMatrixNorm", "Std", "StdMean", "Var", "VarMean", "Max",
    "Min", "Amax", "Amin", "Aminmax", "Prod", "Logsumexp", "Median", "Dot", "Trace", "LinalgSvd",
}  # fmt: skip
"""Nodes whose output says something of a weight, but is none: the scale of a quantized weight, a norm."""
_SQUARES = {"Pow", "LinalgVectorNorm", "Norm", "Var", "Std", "VarMean", "StdMean"}
"""Nodes that multiply what enters them with itself: after a difference of activation and weight, a distance,
the error signal meets the weight there."""
_PRODUCTS = {
    "Mm", "Bmm", "Addmm", "Addbmm", "Baddbmm", "Linear", "Convolution", "Trilinear", "Cdist", "GroupedMm",
    "ScaledGroupedMm",
}  # fmt: skip
"""Nodes of a product with a batch of vectors. (A weight's product with one vector measures it, as spectral
normalization does.)"""
_SHAPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}
_PURE_NODES = 16  # a weight that was derived before the forward began has fewer nodes behind it


class Weight(NamedTuple):
    """A weight to look for.

    Args:
        name: its full name in the model: the layer's, if it is patched, else the parameter's.
        patched: whether a patched layer holds it; else no layer that could be patched does.
        shape: of the parameter.
        compiled: whether its layer has run in compiled code, which then is taken to have rerouted it.
    """

    name: str
    patched: bool
    shape: tuple[int, ...]
    compiled: bool = False


class Finding(NamedTuple):
    """A place in the graph where an error signal is multiplied by a weight itself.

    Args:
        name: of the patched layer, or the full name of a parameter that no layer holds.
        patched: whether it is a patched layer: then its error signal should have gone through V.
        shape: of the weight.
        operation: the graph's name for what was done, such as "MmBackward0".
    """

    name: str
    patched: bool
    shape: tuple[int, ...]
    operation: str


class _Flow(NamedTuple):
    """What a node passes on: whether it is an activation, weights whose own path it lies on, and weights of
    which it holds a summary."""

    activation: bool = False
    weights: frozenset[Weight] = frozenset()
    summaries: frozenset[Weight] = frozenset()


_ACTIVATION = _Flow(activation=True)


def mark_as_layer(output: Tensor) -> None:
    """Notes in the graph that this is a layer's output, where the graph cannot tell: data times a weight."""
    for level in levels(output):
        for node in _nodes_of_call(level.grad_fn):
            node.metadata[MARK] = True


def _nodes_of_call(node: Node | None) -> Iterator[Node]:
    """The last nodes of a layer's call: where its output was given another shape, those before that, too."""
    while node is not None:
        yield node
        node = node.next_functions[0][0] if _name(node) in _SHAPING else None


def audit(
    roots: Iterable[Node],
    weights: Mapping[int, Weight],
    own: Iterable[Tensor],
    since: int = 0,
) -> list[Finding]:
    """The findings in a graph, each once.

    Args:
        roots: the nodes of the graph's outputs.
        weights: what to look for, by the id of the parameter.
        own: all parameters and buffers of the model, and the weights to look for.
        since: nodes made before this one (by sequence number) are not looked into.
    """
    known = {id(tensor): tensor for tensor in own}
    by_storage = {storage_of(tensor): weights.get(key) for key, tensor in known.items()}
    by_storage.pop(None, None)
    flows: dict[Node, _Flow] = {}
    found: dict[Finding, None] = {}
    rerouted: set[Node] = set()
    for node, inputs in _in_order(roots, flows, rerouted, since):
        name = _name(node)
        if (leaf := getattr(node, "variable", None)) is not None and not inputs:
            weight = weights.get(id(leaf))
            flows[node] = _Flow(id(leaf) not in known, frozenset(() if weight is None else (weight,)))
            continue
        if name.startswith("CompiledFunction"):  # whatever it does with data and weights, it does inside
            met = iter([w for flow in inputs for w in flow.weights if w.patched and not w.compiled])
            flows[node] = _ACTIVATION
        elif node in rerouted or _is_layer(node, name, inputs, by_storage):
            flows[node] = _ACTIVATION
            continue
        else:
            met = _met(name, inputs, saved_tensors(node), by_storage)
            flows[node] = _passed_on(name, inputs)
        for weight in met:
            found[Finding(weight.name, weight.patched, weight.shape, node.name())] = None
    return list(found)


def _in_order(
    roots: Iterable[Node], flows: dict[Node, _Flow], rerouted: set[Node], since: int
) -> Iterator[tuple[Node, list[_Flow]]]:
    """Each node after all that enters it, with the flows that do; the caller puts its own into `flows`. Nodes
    of calls that a feedback edge has rerouted, which only the edge has behind it, are put into `rerouted`."""
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in flows:
            stack.pop()
            continue
        earlier = [n for n, _ in node.next_functions if n is not None]
        if _EDGES.search(node.name()):
            rerouted.update(_nodes_of_call(node.next_functions[0][0]))
        if earlier and sequence_number(node) < since and not _is_pure(node):
            flows[node] = _ACTIVATION
        elif missing := [n for n in earlier if n not in flows]:
            stack += missing
        else:
            yield node, [flows[n] for n in earlier]


def _is_pure(node: Node) -> bool:
    """Whether there is so little behind a node that it can only be a form of a weight."""
    nodes, seen = [node], {node}
    while nodes and len(seen) <= _PURE_NODES:
        for earlier, _ in nodes.pop().next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                nodes.append(earlier)
    return not nodes


def _is_layer(node: Node, name: str, inputs: list[_Flow], by_storage: Mapping[int | None, Any]) -> bool:
    """Whether what leaves a node is an activation although nothing but weights enters it: data do, too."""
    if name in _LOOK_UPS or _EDGES.search(name):
        return True
    activation = any(flow.activation for flow in inputs)  # a bias that is nobody's counts as one
    if (not activation or name in _PRODUCTS or name in _SHAPING) and MARK in node.metadata:
        return True
    if activation:
        return False
    if name not in _PRODUCTS and not isinstance(node, BackwardCFunction):
        return False
    without_graph = any(earlier is None for earlier, _ in node.next_functions)
    return without_graph and not all(storage_of(saved) in by_storage for saved in saved_tensors(node))


def _met(
    name: str, inputs: list[_Flow], saved: Iterable[Tensor], by_storage: Mapping[int | None, Weight | None]
) -> Iterator[Weight]:
    """The weights that meet an activation in a node."""
    if name in _LINEAR or not any(flow.activation for flow in inputs):
        return
    elementwise = name in _ELEMENTWISE
    for place, flow in enumerate(inputs):
        if any(other.activation for at, other in enumerate(inputs) if at != place):
            summaries = () if elementwise else flow.summaries
            yield from (w for w in (*flow.weights, *summaries) if w.patched or not elementwise)
        if flow.activation and name in _SQUARES:
            yield from flow.weights
    for tensor in saved:
        weight = by_storage.get(storage_of(tensor))
        if weight is not None and (weight.patched or not elementwise):
            yield weight


def _passed_on(name: str, inputs: list[_Flow]) -> _Flow:
    """An activation keeps the patched weights that were added to it; a form of a weight stays one."""
    activation = any(flow.activation for flow in inputs)
    weights = frozenset[Weight]().union(*(flow.weights for flow in inputs))
    summaries = frozenset[Weight]().union(*(flow.summaries for flow in inputs))
    if activation:
        if name not in _LINEAR and len(inputs) > 1:
            return _ACTIVATION  # it was told in this node
        weights = frozenset(weight for weight in weights if weight.patched)
        return _Flow(True, weights, frozenset())
    if name in _REDUCTIONS:
        return _Flow(False, frozenset(), weights | summaries)
    return _Flow(False, weights, summaries)


def _name(node: Node) -> str:
    """A node's name without what says that it is one: "Addmm" of "AddmmBackward0"."""
    return _short(node.name())


@cache
def _short(name: str) -> str:
    return re.sub(r"(Backward\w*)?$", "", name.rpartition("::")[2])


def graph_of(output: Any) -> list[Node]:
    """The nodes of all tensors in a module's output."""
    made = (level.grad_fn for tensor in tensors_in(output) for level in levels(tensor))
    return [node for node in made if node is not None]


def tensors_in(value: Any, objects: bool = True) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives: in tuples, lists, mappings and, unless not wanted, in the
    attributes of objects, such as dataclasses."""
    parts, seen = [value], set[int]()
    while parts:
        part = parts.pop()
        if isinstance(part, Tensor):
            yield part
            continue
        if isinstance(part, (str, bytes)) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            parts += part
        elif objects and hasattr(part, "__dict__") and not isinstance(part, type):
            parts += vars(part).values()
