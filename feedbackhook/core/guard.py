"""Guards: hooks on weights, so that exact backprop in a backward never goes unnoticed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.audit import Finding
from feedbackhook.core.errors import ExactGradientError
from feedbackhook.core.layer import Layer
from feedbackhook.core.signals import comes_from_output, if_compiled
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


class SiteGuards:
    """Hooks on all parameters of a model whose sites are the inputs of modules. There, no weight is rerouted,
    so what matters is that each backward comes from the output.

    Args:
        root: the model.
        state: the patch's.
        audit: as for `BackwardAudits`, but for all parameters of the model.
    """

    def __init__(
        self, root: nn.Module, state: PatchState, audit: Callable[[Iterable[Node]], list[Finding]]
    ) -> None:
        self._root, self._state, self._audit = root, state, audit
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._sound: OrderedDict[int, bool] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles guard their own parameters."""
        return {**self.__dict__, "_hooks": {}, "_sound": OrderedDict()}

    def update(self) -> None:
        """Guard the parameters that are not guarded yet."""
        if not self._state.sites:
            return
        for name, parameter in self._root.named_parameters():
            if parameter.requires_grad and parameter not in self._hooks:
                guard = _SiteGuard(self, name)
                self._hooks[parameter] = parameter.register_hook(guard)

    def clear(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def check(self, name: str) -> None:
        """Check the running backward, in which a parameter got a gradient.

        Raises:
            ExactGradientError: it does not come from the output.
        """
        state, running = self._state, current_backward()
        if not state.enabled or state.exact or state.heard.has(running) or torch.compiler.is_compiling():
            return
        if running not in self._sound:
            roots = backward_roots() or []
            self._sound[running] = comes_from_output(roots) or not self._audit(roots)
            if len(self._sound) > _BACKWARDS:
                self._sound.popitem(last=False)
        if not self._sound[running]:
            where = f"the output of {state.output!r}" if state.output else "the model's output"
            raise ExactGradientError(
                f"{name!r} got a gradient in a backward that does not come from {where}, so the sites had no "
                "error to send and the gradients are exact. Call the model itself, or name a module that is "
                "called with output= in feedbackhook.patch; or put `with patch.exact():` around a backward "
                f"that is meant to be exact{if_compiled()}"
            )


class _SiteGuard:
    def __init__(self, guards: SiteGuards, name: str) -> None:
        self._guards, self._name = weakref.ref(guards), name

    def __call__(self, gradient: Tensor) -> None:
        if (guards := self._guards()) is not None:
            guards.check(self._name)


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
