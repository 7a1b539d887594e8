"""The state of a patch: what it reroutes, its switches, and who listens to it.

This file knows `Layer` and `ModuleSite` alone. Whoever wants to follow error signals or optimizer steps
subscribes here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.layer import Layer, ModuleSite, Patched
from feedbackhook.core.projection import Projection
from feedbackhook.core.torch_internals import current_backward
from feedbackhook.rng import STREAM, check_stream

ErrorListener = Callable[[Patched, Tensor, Tensor], None]
"""Called with the layer or site, the error signal that it sends on, and the one that backprop would send on
from the same arriving error signal."""

CallListener = Callable[[Patched, Tensor, Tensor], None]
"""Called in the forward with the layer, the input and the output of a call of its function."""

_BACKWARDS = 64  # how many backwards are remembered: reentrant checkpoints run one inside the other


class StepListener(Protocol):
    """Told about every step of every optimizer; `PatchState.held_by` tells whether it concerns the patch."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before the optimizer steps."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after it has stepped. For an optimizer that steps another inside its own step, only the
        inner step counts."""


class PatchState:
    """The layers of a patch, its switches and its listeners.

    Args:
        layers: the patched weights.
        sites: the modules whose inputs are rerouted.
        output: full name of the module whose output's gradient direct rules send ("" is the model); None if
            no rule is direct.

    Attributes:
        layers: the patched weights. Their number changes if weights are tied or untied later.
        sites: as above.
        output: as above.
        targets: the classes for the next forward, see `Patch.targets`.
        parts: forwards with sites that have not come to an output yet.
        handed_out: whether the user has asked for the learned tensors.
        enabled: if False, forwards build plain graphs and the guards accept any gradient.
        exact: if True, backwards use W instead of V.
        error_listeners: called with each error signal that V sends on.
        call_listeners: called with the input and output of each call of a layer's function.
        step_listeners: called before and after optimizer steps.
        arrivals: which layers each running backward has reached.
        site_at: the site at a module's input, by the module's full name.
        heard: which backwards came through the output.
        own: the layer whose `weight` a module holds, by the module's full name.
        inside: the layers inside a module, by the module's full name.
    """

    def __init__(
        self, layers: Iterable[Layer], sites: Iterable[ModuleSite] = (), output: str | None = None
    ) -> None:
        self.layers = list(layers)
        self.sites = list(sites)
        self.output = output
        self.targets: Tensor | None = None
        self.parts: WeakSet[object] = WeakSet()
        self.handed_out = False
        self.enabled = True
        self.exact = False
        self.error_listeners: OrderedDict[int, ErrorListener] = OrderedDict()
        self.call_listeners: OrderedDict[int, CallListener] = OrderedDict()
        self.step_listeners: OrderedDict[int, StepListener] = OrderedDict()
        self.arrivals = Arrivals()
        self.heard = Heard()
        self.site_at = {site.info.name: site for site in self.sites}
        self.own: dict[str, Layer] = {}
        self.inside: dict[str, list[Layer]] = {}
        self.index_layers()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no listeners."""
        kinds = ("error_listeners", "call_listeners", "step_listeners")
        listeners: dict[str, Any] = {kind: OrderedDict() for kind in kinds}
        return {**self.__dict__, **listeners, "targets": None, "parts": None, "stream": STREAM}

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_stream(state)
        self.__dict__.update({name: value for name, value in state.items() if name != "stream"})
        self.parts = WeakSet()

    @property
    def patched(self) -> list[Patched]:
        """The layers, then the sites."""
        return [*self.layers, *self.sites]

    @property
    def projections(self) -> list[Projection]:
        """The matrices B of all direct layers and sites."""
        every = (each.feedback for each in self.patched)
        return [feedback for feedback in every if isinstance(feedback, Projection)]

    def paths(self) -> set[str]:
        """Return the full names of the modules that need a mark: those of layers, sites and the output, and
        all their ancestors."""
        names = [site.info.name for site in self.sites]
        if self.output is not None:
            names.append(self.output)
        return set(self.inside).union(*map(_ancestors, names))

    def index_layers(self) -> None:
        """Find which layer each module holds, and which layers are inside it."""
        self.own, self.inside = {}, {}
        for layer in self.layers:
            for target in layer.targets:
                place = target.place
                if place.attribute == "weight":
                    self.own[place.path] = layer
                for ancestor in _ancestors(place.path):
                    inside = self.inside.setdefault(ancestor, [])
                    if layer not in inside:
                        inside.append(layer)

    def listen_to_errors(self, listener: ErrorListener) -> RemovableHandle:
        """Call `listener` with each error signal that V sends on, until the handle's `remove()` is called.

        While anyone listens, each error signal takes one more product, with W.
        """
        handle = RemovableHandle(self.error_listeners)
        self.error_listeners[handle.id] = listener
        return handle

    def listen_to_calls(self, listener: CallListener) -> RemovableHandle:
        """Call `listener` with each call of a layer's function in a forward that builds a graph outside
        compiled code, until the handle's `remove()` is called."""
        handle = RemovableHandle(self.call_listeners)
        self.call_listeners[handle.id] = listener
        return handle

    def listen_to_steps(self, listener: StepListener) -> RemovableHandle:
        """Tell `listener` about optimizer steps, until the handle's `remove()` is called."""
        handle = RemovableHandle(self.step_listeners)
        self.step_listeners[handle.id] = listener
        return handle

    def drop_listeners(self) -> None:
        """Remove all listeners."""
        self.error_listeners.clear()
        self.call_listeners.clear()
        self.step_listeners.clear()

    def held_by(self, optimizer: Optimizer) -> list[Patched]:
        """Return the layers whose weight the optimizer holds, and the sites whose module it trains."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [each for each in self.patched if any(id(p) in held for p in each.parameters())]

    @contextmanager
    def exact_backward(self) -> Iterator[None]:
        """Within this context, backwards use W instead of V, in graphs that compiled code has not built."""
        before = self.exact
        self.exact = True
        try:
            yield
        finally:
            self.exact = before

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within this context, call none of the current listeners to errors and calls, and no probe;
        afterwards, restore them, all counts and each layer's feedback."""
        listeners, self.error_listeners = self.error_listeners, OrderedDict()
        of_calls, self.call_listeners = self.call_listeners, OrderedDict()
        try:
            with ExitStack() as stack:
                for each in self.patched:
                    stack.enter_context(each.undisturbed())
                yield
        finally:
            self.error_listeners, self.call_listeners = listeners, of_calls


class PatchHandle(Protocol):
    """What listeners need from a patch; `feedbackhook.Patch` has it."""

    @property
    def model(self) -> nn.Module:
        """The patched model."""

    @property
    def state(self) -> PatchState:
        """The state to subscribe to."""


class Heard:
    """The backwards that came through an output whose error direct rules send."""

    def __init__(self) -> None:
        self._backwards: OrderedDict[int, None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Backwards belong to one process."""
        return {"_backwards": OrderedDict()}

    def note(self, backward: int) -> None:
        """Record that a backward, by its id, has come to the output."""
        self._backwards[backward] = None
        if len(self._backwards) > _BACKWARDS:
            self._backwards.popitem(last=False)

    def has(self, backward: int) -> bool:
        """Whether a backward has come to the output."""
        return backward in self._backwards


class Arrivals:
    """Which layers each running backward has reached. Backwards are told apart by their id, so that several
    threads may run them at once."""

    def __init__(self) -> None:
        self._reached: OrderedDict[int, set[Patched]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Backwards belong to one process."""
        return {"_reached": OrderedDict()}

    def note(self, layer: Patched) -> None:
        """Record that the running backward has reached a call of a layer that was rerouted, or whose input
        requires no gradient."""
        layer.last_backward = running = current_backward()
        if (reached := self._reached.get(running)) is None:
            reached = self._reached[running] = set()
            if len(self._reached) > _BACKWARDS:
                self._reached.popitem(last=False)
        reached.add(layer)

    def has_reached(self, layer: Patched) -> bool:
        """Whether the running backward has reached the layer."""
        return layer in self._reached.get(current_backward(), ())


def _ancestors(name: str) -> Iterator[str]:
    """Yield the full names of a module's ancestors, the root ("") first, and its own name last."""
    yield ""
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
