"""Guards: a hook on each weight, so that exact backprop in a backward never goes unnoticed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from feedbackhook.core.audit import Finding
from feedbackhook.core.errors import ExactGradientError
from feedbackhook.core.layer import Layer
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import Node, backward_roots, current_backward, forget_compiled_code

_BACKWARDS = 64  # how many backwards are remembered: reentrant checkpoints run one inside the other


class BackwardAudits:
    """The audits of running backwards, by their id, so that several threads may run backwards at once.

    Args:
        state: the patch's.
        audit: returns the findings in a graph, given its roots.
        look_again: makes the next forwards be audited as the first ones were.

    Attributes:
        due: whether to audit the whole graph of the next backward, since a forward did something new.
    """

    def __init__(
        self,
        state: PatchState,
        audit: Callable[[Iterable[Node]], list[Finding]],
        look_again: Callable[[], None],
    ) -> None:
        self.state = state
        self.due = False
        self.look_again = look_again
        self._audit = audit
        self._found: OrderedDict[int, dict[str, Finding] | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Backwards belong to one process."""
        return {**self.__dict__, "due": False, "_found": OrderedDict()}

    def guard(self, layer: Layer) -> Guard:
        """Return the hook for a parameter of the layer."""
        return Guard(self, layer)

    def is_audited(self) -> bool:
        """Whether the graph of the running backward is audited in any case."""
        return self.due or current_backward() in self._found

    def found(self) -> dict[str, Finding] | None:
        """Return the patched layers that the graph of the running backward uses exactly, by name, or None if
        that graph cannot be found."""
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
    """The hook on a weight. Its gradient must come from a rerouted call, or from the weights alone, as the
    gradient of a penalty does."""

    def __init__(self, audits: BackwardAudits, layer: Layer) -> None:
        self._audits, self._layer = weakref.ref(audits), weakref.ref(layer)

    def __call__(self, gradient: Tensor) -> None:
        audits, layer = self._audits(), self._layer()
        if audits is None or layer is None or not audits.state.enabled or audits.state.exact:
            return
        if torch.compiler.is_compiling():
            return
        reached = audits.state.arrivals.has_reached(layer)
        if reached and not audits.is_audited():
            return  # as in most steps
        found = audits.found()
        if found is None:
            if reached or layer.compiled:
                return
            how = "a call that the patch did not see"
        elif (finding := found.get(layer.info.name)) is not None:
            how = f"a call that the patch did not reroute ({finding.operation})"
        else:
            return
        audits.look_again()
        raise _exact_gradient(layer.info.name, how)


def _exact_gradient(name: str, how: str) -> ExactGradientError:
    again = ""
    if forget_compiled_code():
        again = (
            ". If the model is compiled, code compiled for a model without a patch may have run. That code "
            "has been dropped now, so run the step again"
        )
    return ExactGradientError(
        f"the weight of {name!r} got a gradient from {how}: it was used outside the forward of every patched "
        "module and their ancestors, in a function that cannot be rerouted, or while the patch was disabled, "
        f"so its error signal went through W. Either pass exclude={[name]} to feedbackhook.patch, or put "
        f"`with patch.exact():` around a backward that is meant to be exact{again}"
    )
