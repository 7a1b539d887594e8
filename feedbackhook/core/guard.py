"""What keeps exact backprop from going unnoticed in a backward: a hook on each weight."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackhook.core.audit import Finding
from feedbackhook.core.edge import Layer
from feedbackhook.core.torch_internals import Node, backward_roots, current_backward, forget_compiled_code

if TYPE_CHECKING:
    from feedbackhook.core.interception import Bracket

MATRIX_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    torch.tensordot,
    F.bilinear,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.baddbmm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}
"""Functions that may send an error signal through a weight without being rerouted. Each call of them is
looked at; what others do is found by the audit."""

_BACKWARDS = 64  # so many are kept in mind: reentrant checkpoints run one inside the other


class ExactGradientError(RuntimeError):
    """An error signal went, or would go, through a patched weight itself instead of through its V."""


class Backwards:
    """What is known of each backward that is running, by its id: state of a backward belongs to it, so that
    threads may run several at once.

    Args:
        audit: the findings in a graph, given its roots.

    Attributes:
        due: whether the next backward's whole graph is looked into: a forward did what none had done before.
    """

    def __init__(self, audit: Callable[[Iterable[Node]], list[Finding]]) -> None:
        self.due = False
        self._audit = audit
        self._reached: OrderedDict[int, set[Layer]] = OrderedDict()
        self._found: OrderedDict[int, dict[str, Finding] | None] = OrderedDict()

    def arrived(self, layer: Layer) -> None:
        """Notes that the backward now running has reached a rerouted call of a layer, or one that has
        nothing upstream."""
        layer.last_backward = running = current_backward()
        if (reached := self._reached.get(running)) is None:
            reached = self._reached[running] = set()
            if len(self._reached) > _BACKWARDS:
                self._reached.popitem(last=False)
        reached.add(layer)

    def has_reached(self, layer: Layer) -> bool:
        """Whether the backward now running has."""
        return layer in self._reached.get(current_backward(), ())

    def is_audited(self) -> bool:
        """Whether the graph of the backward now running is looked into in any case."""
        return self.due or current_backward() in self._found

    def found(self) -> dict[str, Finding] | None:
        """The patched layers that the graph of the backward now running uses exactly, by name; None if that
        graph cannot be found."""
        running = current_backward()
        if running not in self._found:
            self.due = False
            roots = backward_roots()
            findings = None if roots is None else {f.name: f for f in self._audit(roots) if f.patched}
            self._found[running] = findings
            if len(self._found) > _BACKWARDS:
                self._found.popitem(last=False)
        return self._found[running]


class Guard:
    """The hook on a weight: its gradient must come from a rerouted call, or from the weights alone, as that
    of a penalty does."""

    def __init__(self, bracket: Bracket, layer: Layer) -> None:
        self._bracket, self._layer = weakref.ref(bracket), weakref.ref(layer)

    def __call__(self, gradient: Tensor) -> None:
        bracket, layer = self._bracket(), self._layer()
        if bracket is None or layer is None or not bracket.enabled or bracket.exact:
            return
        if torch.compiler.is_compiling():
            return
        reached = bracket.backwards.has_reached(layer)
        if reached and not bracket.backwards.is_audited():
            return  # as in most steps
        found = bracket.backwards.found()
        if found is None:
            if reached or layer.compiled:
                return
            how = "a call that the patch did not see"
        elif (finding := found.get(layer.info.name)) is not None:
            how = f"a call that the patch did not reroute ({finding.operation})"
        else:
            return
        bracket.look_again()
        again = ""
        if forget_compiled_code():
            again = (
                ". If the model is compiled: code that was made for a model without a patch may have been "
                "used; it is forgotten now, so run the step again"
            )
        raise ExactGradientError(
            f"the weight of {layer.info.name!r} got a gradient from {how}: it was used outside the forward "
            "of every patched module and their ancestors, in a function that cannot be rerouted, or while "
            "the patch was disabled, so its error signal went through W. Ways out: "
            f"exclude={[layer.info.name]} in feedbackhook.patch, or `with patch.exact():` around a backward "
            f"that is meant to be exact{again}"
        )


def refuse_product(bracket: Bracket, func: Any, args: tuple[Any, ...], copies: Any) -> None:
    """Raises if a function that is not rerouted multiplies a patched weight with what has an upstream."""
    tensors = [arg for arg in _flatten(args) if isinstance(arg, Tensor)]
    uses = [bracket.weights.find(tensor, copies) for tensor in tensors]
    use = next((use for use in uses if use is not None), None)
    others = (tensor for tensor, own in zip(tensors, uses, strict=True) if own is None)
    if bracket.enabled and use is not None and any(other.requires_grad for other in others):
        raise exact_use(use.layer.info.name, str(getattr(func, "__name__", func)))


def exact_use(name: str, operation: str) -> ExactGradientError:
    """The error for a patched weight in a forward's call that cannot be rerouted."""
    return ExactGradientError(
        f"the weight of {name!r} is used in {operation}, which cannot be rerouted: its error signal would go "
        f"through W. Use F.linear, or exclude={[name]} in feedbackhook.patch"
    )


def _flatten(args: Iterable[Any]) -> Iterable[Any]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _flatten(arg)
        else:
            yield arg
