"""The audit: what a graph does with the weights, whichever functions built it.

A list of functions misses what it does not contain. The graph of a forward misses nothing: the audit walks it
from its roots to its leaves and classifies each node by what flows into it.

- *Activations* are the outputs of layers and of embeddings, and whatever was computed from them.
- *Weights* are patched weights and what was computed from them (transposed, normalized, masked, dequantized).

A node multiplies an error signal by W if a weight's path meets an activation there. If the node is linear in
both (it adds, joins or copies them), it does not, but a later node that squares the result does. A node also
does if an activation enters it and it has saved a tensor that shares memory with W. This reveals frozen
weights, `.data` and `.detach()`, whose path is not in the graph. The feedback edge is exempt. So are calls
that the patch rerouted, and calls whose input requires no gradient (`mark_as_layer`).

If the matrix belongs to no layer, this is a finding of another kind: a weight that cannot be patched. A scale
is not a finding, because it meets the activation in an elementwise function, such as a normalization.

The audit cannot see compiled code, nor a frozen weight through a copy or through hooks on saved tensors, as
in a non-reentrant checkpoint or `save_on_cpu`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from feedbackhook.core.memory import Memory
from feedbackhook.core.torch_internals import Node, levels, saved_tensors, sequence_number

MARK = "feedbackhook"
"""The key in a node's metadata that marks a layer's output."""

_LAYER_EDGES = re.compile(r"FeedbackEdge|TransformableEdge")
_EDGES = re.compile(rf"{_LAYER_EDGES.pattern}|NotDifferentiable|ApplyTemplate")
"""Nodes that send V's or B's product; dynamo turns an edge, like anybody's own function, into the last."""
_LOOK_UPS = {"Embedding", "EmbeddingBag", "EmbeddingSparse", "EmbeddingDense"}
_LINEAR = {
    "Add", "Sub", "Rsub", "Cat", "Stack", "Where", "SWhere", "Copy", "CopySlices", "IndexPut", "IndexPutImpl",
    "IndexAdd", "IndexCopy", "MaskedFill", "MaskedScatter", "Scatter", "ScatterAdd", "SelectScatter",
    "SliceScatter", "ForeachAdd", "ForeachSub",
}  # fmt: skip
"""Nodes that are linear in all their inputs: an error signal passes them without meeting a weight."""
_ELEMENTWISE = {
    "Mul", "Div", "Addcmul", "Addcdiv", "Pow", "Prelu", "Maximum", "Minimum", "Lerp", "PreluKernel",
    "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm",
    "FusedRmsNorm",
}  # fmt: skip
_REDUCTIONS = {
    "Sum", "Mean", "Norm", "LinalgVectorNorm", "LinalgMatrixNorm", "Std", "StdMean", "Var", "VarMean", "Max",
    "Min", "Amax", "Amin", "Aminmax", "Prod", "Logsumexp", "Median", "Dot", "Trace", "LinalgSvd",
}  # fmt: skip
"""Nodes whose output summarizes a weight but is not one: the scale of a quantized weight, a norm."""
_SQUARES = {"Pow", "LinalgVectorNorm", "Norm", "Var", "Std", "VarMean", "StdMean"}
"""Nodes that multiply their input by itself: in a distance, after the difference of activation and weight,
the error signal meets the weight there."""
_PRODUCTS = {
    "Mm", "Bmm", "Addmm", "Addbmm", "Baddbmm", "Linear", "Convolution", "Trilinear", "Cdist", "GroupedMm",
    "ScaledGroupedMm",
}  # fmt: skip
"""Nodes that multiply by a batch of vectors. (A product with a single vector only measures the weight, as
spectral normalization does.)"""
_SHAPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}
_PURE_NODES = 16  # a weight derived before the forward began has fewer nodes behind it


class Weight(NamedTuple):
    """A weight to look for.

    Args:
        name: full name in the model: that of the layer if it is patched, otherwise that of the parameter.
        patched: whether a patched layer holds it; otherwise no layer that can be patched does.
        shape: shape of the parameter.
        compiled: whether its layer has run in compiled code, which is then assumed to have rerouted it.
    """

    name: str
    patched: bool
    shape: tuple[int, ...]
    compiled: bool = False


class Finding(NamedTuple):
    """A place in the graph where an error signal is multiplied by a weight itself.

    Attributes:
        name: full name of the patched layer, or of a parameter that no layer holds.
        patched: whether it is a patched layer, whose error signal should have gone through V.
        shape: shape of the weight.
        operation: the graph's name of the operation, such as "MmBackward0".
    """

    name: str
    patched: bool
    shape: tuple[int, ...]
    operation: str


class _Flow(NamedTuple):
    """What a node passes on: whether it is an activation, the weights on whose path it lies, and the weights
    that it summarizes."""

    activation: bool = False
    weights: frozenset[Weight] = frozenset()
    summaries: frozenset[Weight] = frozenset()


_ACTIVATION = _Flow(activation=True)


def mark_as_layer(output: Tensor) -> None:
    """Mark a layer's output in the graph where the graph cannot tell, as for data times a weight."""
    for level in levels(output):
        for node in _nodes_of_call(level.grad_fn):
            node.metadata[MARK] = True


def _nodes_of_call(node: Node | None) -> Iterator[Node]:
    """Yield the last nodes of a layer's call. If its output was reshaped, this includes the nodes before."""
    while node is not None:
        yield node
        node = node.next_functions[0][0] if _name(node) in _SHAPING else None


def audit(
    roots: Iterable[Node],
    weights: Mapping[int, Weight],
    own: Iterable[Tensor],
    since: int = 0,
) -> list[Finding]:
    """Return the findings in a graph, each once.

    Args:
        roots: the nodes of the graph's outputs.
        weights: the weights to look for, by the id of the parameter.
        own: all parameters and buffers of the model, and the weights to look for.
        since: sequence number of the first node to examine; earlier nodes are skipped.
    """
    known = {id(tensor): tensor for tensor in own}
    memory = Memory((tensor, weights.get(key)) for key, tensor in known.items())
    flows: dict[Node, _Flow] = {}
    found: dict[Finding, None] = {}
    rerouted: set[Node] = set()
    for node, inputs in _in_order(roots, flows, rerouted, since):
        name = _name(node)
        if (leaf := getattr(node, "variable", None)) is not None and not inputs:
            weight = weights.get(id(leaf))
            flows[node] = _Flow(id(leaf) not in known, frozenset(() if weight is None else (weight,)))
            continue
        if name.startswith("CompiledFunction"):  # data and weights meet inside it
            met = iter([w for flow in inputs for w in flow.weights if w.patched and not w.compiled])
            flows[node] = _ACTIVATION
        elif node in rerouted or _is_layer(node, name, inputs, memory):
            flows[node] = _of_weights_alone(node, flows) or _ACTIVATION
            continue
        else:
            met = _met(name, inputs, saved_tensors(node), memory)
            flows[node] = _passed_on(name, inputs)
        for weight in met:
            found[Finding(weight.name, weight.patched, weight.shape, node.name())] = None
    return list(found)


def _in_order(
    roots: Iterable[Node], flows: dict[Node, _Flow], rerouted: set[Node], since: int
) -> Iterator[tuple[Node, list[_Flow]]]:
    """Yield each node after its inputs, with the flows of these; the caller adds the node's own to `flows`.

    Nodes of calls that a feedback edge has rerouted are added to `rerouted`.
    """
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
    """Whether so few nodes are behind a node that it can only be a form of a weight."""
    nodes, seen = [node], {node}
    while nodes and len(seen) <= _PURE_NODES:
        for earlier, _ in nodes.pop().next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                nodes.append(earlier)
    return not nodes


def _is_layer(node: Node, name: str, inputs: list[_Flow], memory: Memory[Weight | None]) -> bool:
    """Whether a node's output is an activation although only weights enter it in the graph, next to data."""
    activation = any(flow.activation for flow in inputs)  # a bias outside the model counts as one
    if _EDGES.search(name) or (name in _LOOK_UPS and not activation):  # look-ups may be weighted by one
        return True
    if (not activation or name in _PRODUCTS or name in _SHAPING) and MARK in node.metadata:
        return True
    if activation:
        return False
    if name not in _PRODUCTS and not isinstance(node, BackwardCFunction):
        return False
    without_graph = any(earlier is None for earlier, _ in node.next_functions)
    return without_graph and not all(memory.sharing(saved) for saved in saved_tensors(node))


def _of_weights_alone(node: Node, flows: Mapping[Node, _Flow]) -> _Flow | None:
    """Return what a layer passes on that was applied to what comes from patched weights alone, as where two
    are merged; None if it was applied to an activation.

    The result is no activation, but may also be one made of a weight as of data, so that only a product with
    another activation counts.
    """
    if not _LAYER_EDGES.search(node.name()):
        return None
    source = flows.get(node.next_functions[1][0])
    if source is None or source.activation:
        return None
    weights = frozenset(weight for weight in source.weights | source.summaries if weight.patched)
    return _Flow(False, frozenset(), weights) if weights else None


def _met(
    name: str, inputs: list[_Flow], saved: Iterable[Tensor], memory: Memory[Weight | None]
) -> Iterator[Weight]:
    """Yield the weights that meet an activation in a node."""
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
        for weight in memory.sharing(tensor):
            if weight is not None and (weight.patched or not elementwise):
                yield weight


def _passed_on(name: str, inputs: list[_Flow]) -> _Flow:
    """Return what a node passes on: an activation keeps the patched weights that were added to it."""
    activation = any(flow.activation for flow in inputs)
    weights = frozenset[Weight]().union(*(flow.weights for flow in inputs))
    summaries = frozenset[Weight]().union(*(flow.summaries for flow in inputs))
    if activation:
        if name not in _LINEAR and len(inputs) > 1:
            return _ACTIVATION  # any weight was found in this node
        weights = frozenset(weight for weight in weights if weight.patched)
        return _Flow(True, weights, frozenset())
    if name in _REDUCTIONS:
        return _Flow(False, frozenset(), weights | summaries)
    return _Flow(False, weights, summaries)


def _name(node: Node) -> str:
    """Return a node's name without its ending: "Addmm" for "AddmmBackward0"."""
    return _short(node.name())


@cache
def _short(name: str) -> str:
    return re.sub(r"(Backward\w*)?$", "", name.rpartition("::")[2])


def graph_of(output: Any) -> list[Node]:
    """Return the nodes of all tensors in a module's output."""
    made = (level.grad_fn for tensor in tensors_in(output) for level in levels(tensor))
    return [node for node in made if node is not None]


def nodes_behind(roots: Iterable[Node]) -> Iterator[Node]:
    """Yield these nodes and all that lead to them, each once, the nearest first."""
    nodes = deque(roots)
    seen = set(nodes)
    while nodes:
        node = nodes.popleft()
        yield node
        for earlier, _ in node.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                nodes.append(earlier)


def has_compiled_code(output: Tensor) -> bool:
    """Whether a part of a tensor's graph was built by code that `torch.compile` has made."""
    return any(is_compiled(node) for node in nodes_behind(graph_of(output)))


def is_compiled(node: Node) -> bool:
    """Whether a node stands for code that `torch.compile` has made."""
    return _name(node).startswith("CompiledFunction")


def tensors_in(value: Any, objects: bool = True) -> Iterator[Tensor]:
    """Yield the tensors in a module's input or output: in tuples, lists, mappings and, if `objects`, in the
    attributes of objects such as dataclasses."""
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
