"""The machinery: module hooks that bracket a forward, and a function mode inside it.

Hooks on each patched module and on each of its ancestors keep a stack of the modules that are running in
this thread. While it is not empty a `TorchFunctionMode` sees every call of the functions in
`products.OPERATIONS` with the weight that the call really uses. A call of a patched weight runs on the
detached input, so that PyTorch's own backward yields the weight and bias gradients alone, and the feedback
edge joins its output to the input. What a list of functions does not hold, the audit of the graph finds: it
looks into a forward in which some module calls a function that it had not called before, and into the
backward that follows.

Under `torch.compile` the hooks, the mode and the edge are traced; counts, probes, audits and the search for
new parameters, which are for the eye and for eager code, are left out of the graph.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from feedbackhook import torch_internals
from feedbackhook.audit import Finding, Weight, audit, graph_of, mark_as_layer, tensors_in
from feedbackhook.edge import Layer, join
from feedbackhook.guard import (
    MATRIX_PRODUCTS,
    Backwards,
    ExactGradientError,
    Guard,
    exact_use,
    refuse_product,
)
from feedbackhook.marks import Link, Mark, mark_of, warn
from feedbackhook.products import OPERATIONS, Call
from feedbackhook.rules import redrawn_by_updates
from feedbackhook.steps import Clock
from feedbackhook.targets import is_layer, layers_in
from feedbackhook.weights import COPYING, Copies, Use, Weights, alias, note_copy

if TYPE_CHECKING:
    from feedbackhook.watch import Watch


class Running(NamedTuple):
    """A module whose forward is running."""

    module: nn.Module
    mark: Mark
    caller: FrameType | None  # None while traced, and where a checkpoint recomputes
    calls: int  # of its layer, when it began


class _Mode(TorchFunctionMode):
    """Hands the calls of the functions in `OPERATIONS` to the bracket and passes all others through.

    One lives from the opening of the outermost module to its end. It holds the stack of the modules that are
    running, so that the stack belongs to a thread, as the stack of modes does, and ends with its mode.

    Attributes:
        running: that stack.
        seen: the functions that the innermost module has called in forwards that passed the audit.
        new: what was called now for the first time: the set where it belongs, and the function.
        copies: what was copied from patched weights in this forward.
        storages: the memory of the patched weights, once it was asked for.
    """

    def __init__(self, bracket: Bracket, traced: bool = False) -> None:
        super().__init__()
        self.bracket = bracket
        self.traced = traced
        self.running: list[Running] = []
        self.seen: set[Any] = set()
        self.new: list[tuple[set[Any], Any]] = []
        self.copies: Copies = {}
        self.storages: dict[int, tuple[Tensor, Layer]] | None = None
        self.since = 0 if traced else torch_internals.next_sequence_number()

    def begin(self, running: Running) -> None:
        self.running.append(running)
        self.seen = running.mark.seen

    def end(self) -> Running:
        ended = self.running.pop()
        if self.running:
            self.seen = self.running[-1].mark.seen
        return ended

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not (self.traced or func in self.seen) and not torch.compiler.is_compiling():
            self.new.append((self.seen, func))
        if func not in _WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)  # most calls, and so the quickest way
        return self.bracket.call(self, func, args, kwargs or {})


_WATCHED = dict.fromkeys((*OPERATIONS, *MATRIX_PRODUCTS, *COPYING, F.multi_head_attention_forward))


class Bracket:
    """All hooks of one patch and their state.

    Args:
        layers: the patched weights.

    Attributes:
        patch: the user's handle.
        root: the patched model.
        enabled: where False, forwards build plain graphs, and the guard lets any gradient pass.
        exact: where True, backwards use W in the place of V.
        observers: each is told, for every error signal that V sends on, the layer and the products of V and
            of W with it.
        watches: each is told when an optimizer that holds a patched weight is about to step, and when it has.
        own: the layer whose `weight` a module holds, by the module's full name.
        inside: the layers inside a module.
    """

    patch: Any
    root: nn.Module

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self.enabled = True
        self.exact = False
        self.observers: list[Callable[[Layer, Tensor, Tensor], None]] = []
        self.watches: list[Watch] = []
        self.own: dict[str, Layer] = {}
        self.inside: dict[str, list[Layer]] = {}
        self.attached = False
        self._set_up()
        self._traced_mode = _Mode(self, traced=True)
        self._tree: list[tuple[nn.Module, str, nn.Module]] = []
        self._known_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._told: set[str] = set()

    def _set_up(self) -> None:
        """What a copy makes anew, since it belongs to parameters, graphs and optimizers of one process."""
        self.backwards = Backwards(self.audit)
        self.weights = Weights(self.layers, functools.partial(Guard, self))
        self._clock: Clock | None = None

    def __getstate__(self) -> dict[str, Any]:
        left = ("backwards", "weights", "_clock", "_traced_mode")
        kept = {name: value for name, value in self.__dict__.items() if name not in left}
        return {**kept, "observers": [], "watches": [], "_known_layers": list(self._known_layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._known_layers = weakref.WeakSet(state["_known_layers"])
        self._traced_mode = _Mode(self, traced=True)
        self._set_up()

    # --- hooks come and go ---------------------------------------------------------------------------------

    def attach(self, model: nn.Module, patch: object) -> None:
        """Hooks the module of each layer and each of its ancestors; `patch` is the user's handle."""
        self.root, self.patch = model, patch
        self._place()
        self._known_layers.update(layers_in(model).values())
        link = Link(self)
        for name in self.inside:
            module = model.get_submodule(name)
            if name:
                parent, _, key = name.rpartition(".")
                self._tree.append((model.get_submodule(parent), key, module))
            Mark(link, name, module)
        self.attached = True
        self._resolve(self.layers)
        torch_internals.forget_compiled_code()

    def _place(self) -> None:
        """Finds which layer each module holds, and which are inside it."""
        self.own, self.inside = {}, {}
        for layer in self.layers:
            for target in layer.targets:
                if target.attribute == "weight":
                    self.own[target.path] = layer
                for ancestor in _ancestors(target.path):
                    inside = self.inside.setdefault(ancestor, [])
                    if layer not in inside:
                        inside.append(layer)

    def detach(self) -> None:
        """Takes away every hook, mark and guard, and a mode that an interrupted forward has left behind."""
        if (mode := self._mode()) is not None:
            torch_internals.take_off(mode)
        for watch in list(self.watches):
            watch.remove()
        if self._clock is not None:
            self._clock.stop()
            self._clock = None
        self.weights.clear()
        patched = (target.module for layer in self.layers for target in layer.targets)
        for module in {*self.root.modules(), *patched, *(child for _, _, child in self._tree)}:
            mark = mark_of(module)
            if mark is not None and mark.link.bracket is self:
                mark.take_off(module)
        self.attached = False
        torch_internals.forget_compiled_code()

    # --- a module's forward --------------------------------------------------------------------------------

    def open(self, mark: Mark, module: nn.Module) -> None:
        """A hooked module's forward is about to run."""
        mode = self._mode()
        if mode is None and torch_internals.is_exporting():
            raise RuntimeError(_NO_EXPORT)
        if mode is None and not torch.is_grad_enabled():
            return  # no graph is built; a module inside that enables gradients opens a bracket of its own
        if torch.compiler.is_compiling():
            self._open_traced(mode, mark, module)
            return
        caller = torch_internals.caller(2)
        if mode is not None and not torch_internals.is_running(mode.running[-1].caller, caller):
            torch_internals.take_off(mode)  # left behind by an interrupt, of which no hook hears
            mode = None
        if mode is None:
            if module.__dict__.get("_is_replica"):
                raise RuntimeError(
                    "a patched model cannot run under nn.DataParallel, whose replicas share one feedback; "
                    "use torch.nn.parallel.DistributedDataParallel"
                )
            self._check_tree()
            self._resolve(self.inside[mark.path])
            mode = _Mode(self)
            mode.__enter__()  # type: ignore[no-untyped-call]
        layer = self.own.get(mark.path)
        mode.begin(Running(module, mark, caller, 0 if layer is None else layer.calls))

    def _open_traced(self, mode: _Mode | None, mark: Mark, module: nn.Module) -> None:
        if mode is None:
            # A mode that is on the stack where a traced graph breaks must be one that it did not make.
            mode = self._traced_mode
            mode.running.clear()
            mode.__enter__()  # type: ignore[no-untyped-call]
        mode.running.append(Running(module, mark, None, 0))

    def close(self, module: nn.Module, inputs: object, output: object) -> None:
        """A hooked module's forward has run, or has raised."""
        mode = self._mode()
        if mode is None:
            return
        if mode.running[-1].module is not module:
            if all(running.module is not module for running in mode.running):
                return
            while mode.running[-1].module is not module:
                mode.running.pop()  # a module inside it raised before its own hook could close it
        if torch.compiler.is_compiling():
            mode.running.pop()
            if not mode.running:
                torch_internals.take_off(mode)
            return
        ended = mode.end()
        if not mode.running:
            torch_internals.take_off(mode)
        if output is None and sys.exc_info()[0] is not None:
            return
        self._check_opaque(ended, output)
        if not mode.running:
            self._audit_forward(mode, ended, inputs, output)

    @contextmanager
    def reopened(self, running: Iterable[Running]) -> Iterator[_Mode]:
        """A bracket in which these modules count as running, for what recomputes a part of their forward."""
        mode = _Mode(self)
        for one in running:
            mode.begin(one._replace(caller=None))
        with mode:
            yield mode

    def _mode(self) -> _Mode | None:
        """This thread's mode of this bracket, while one of its modules is running."""
        if not torch.compiler.is_compiling():
            top = torch_internals.top_function_mode()
            if top is None or (type(top) is _Mode and top.bracket is self):
                return top  # the usual cases, and quick
        for mode in torch_internals.function_modes():
            if isinstance(mode, _Mode) and mode.bracket is self:
                return mode
        return None

    # --- a call inside it ----------------------------------------------------------------------------------

    def call(self, mode: _Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a function that is watched."""
        eager = not torch.compiler.is_compiling()
        read = OPERATIONS.get(func)
        if read is None or not torch.is_grad_enabled():
            return self._other_call(mode, func, args, kwargs, eager)
        call = read(*args, **kwargs)
        use = self._use_of(call.weight, mode, eager)
        if use is not None:
            return self._reroute(mode, use, call, func, args, kwargs, eager)
        if eager and func not in _LAYERS:
            refuse_product(self, func, (*args, *kwargs.values()), mode.copies)
        upstream = torch_internals.requires_grad(call.input)
        if eager and upstream:
            self._tell_unknown(func.__name__, call.weight)
        output = func(*args, **kwargs)
        if eager and not upstream:
            mark_as_layer(output)
        return output

    def _other_call(
        self, mode: _Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], eager: bool
    ) -> Any:
        """One that is not rerouted: it copies, multiplies matrices, holds other calls, or builds no graph."""
        if func in COPYING:
            copy = func(*args, **kwargs)
            if eager and args and isinstance(args[0], Tensor):
                use = self.weights.find(args[0], mode.copies)
                if use is None and not args[0].requires_grad:
                    use = self._alias(args[0], mode)
                if use is not None:
                    note_copy(use, copy, mode.copies, func, args, kwargs)
            return copy
        if not torch.is_grad_enabled():
            if eager:
                self._follow_checkpoint(mode)
        elif func is F.multi_head_attention_forward:
            with mode:
                return torch_internals.multi_head_attention(*args, **kwargs)
        elif eager:
            refuse_product(self, func, (*args, *kwargs.values()), mode.copies)
        return func(*args, **kwargs)

    def _use_of(self, weight: Tensor, mode: _Mode, eager: bool) -> Use | None:
        """The patched layer to which a weight in a call belongs.

        A parameter belongs to itself, wherever it is used, and so do its views (attention uses a third of
        its projection at a time), its copies and its aliases. A weight that is derived from parameters
        (standardized, normalized, reparametrized) belongs to the module whose forward is running.
        """
        if (use := self.weights.find(weight, mode.copies)) is not None:
            return use
        layer = self.own.get(mode.running[-1].mark.path)
        if layer is not None and layer.may_derive(weight):
            if eager:
                layer.use(weight)
            return Use(layer, weight)
        return self._alias(weight, mode) if eager else None

    def _alias(self, tensor: Tensor, mode: _Mode) -> Use | None:
        """The weight with which a tensor shares memory, if it does."""
        if mode.storages is None:
            mode.storages = self.weights.storages()
        return alias(tensor, mode.storages)

    def _reroute(
        self,
        mode: _Mode,
        use: Use,
        call: Call,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        eager: bool,
    ) -> Tensor:
        layer = use.layer
        upstream = torch_internals.requires_grad(call.input)
        if not eager:
            layer.compiled = True
            layer.feedback.parts(use.weight)  # made here, since a traced backward may keep nothing
        else:
            _refuse(layer, call)
            if torch_internals.saves_through_hooks():
                self._follow_checkpoint(mode)
            if layer.depth is None:
                layer.depth = sum(other.depth is not None for other in self.layers)
            layer.calls += 1
            layer.upstream = layer.upstream or upstream
        if not upstream or not self.enabled:
            output: Tensor = func(*args, **kwargs)
            if eager and output.requires_grad:
                self._note_arrival(layer, output, exact=upstream)
            return output
        output = call.run(func, args, kwargs, call.input.detach())
        return join(output, call.input, use.weight.detach(), use.part, self, layer, call)

    def _note_arrival(self, layer: Layer, output: Tensor, exact: bool) -> None:
        """Lets an error signal at an output that is not rerouted be known: nothing lies upstream of it, or
        the patch is disabled (`exact`)."""
        shape = None if output.is_nested else output.shape

        def arrived(error: Tensor) -> None:
            self.backwards.arrived(layer)
            if layer.taps and not exact:
                layer.tell(None, error if shape is None else error.reshape(shape))

        if not exact:
            mark_as_layer(output)
        # An in-place activation gives a view another node, which would leave the hook behind.
        (output if output._base is None else output._base).register_hook(arrived)

    def _follow_checkpoint(self, mode: _Mode) -> None:
        """A checkpoint that is running recomputes in the backward, where no module of ours opens a bracket if
        it checkpoints a function: its recomputation gets one."""
        running = tuple(mode.running)

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def recompute(*args: Any, **kwargs: Any) -> Any:
                if self._mode() is not None or not self.attached:
                    return function(*args, **kwargs)
                with self.reopened(running) as again:
                    output = function(*args, **kwargs)
                self._audit_forward(again, running[-1], (args, kwargs), output)
                return output

            return recompute

        torch_internals.wrap_checkpoint(wrap)

    # --- what is not known is reported ---------------------------------------------------------------------

    def audit(self, nodes: Iterable[Any], since: int = 0) -> list[Finding]:
        """What a graph does with weights of this model, by `feedbackhook.audit`."""
        held = {
            id(parameter)
            for module in self.root.modules()
            if is_layer(module)
            for parameter in module.parameters(recurse=False)
        }
        parameters = dict(self.root.named_parameters())
        weights = {
            id(parameter): Weight(name, False, tuple(parameter.shape))
            for name, parameter in parameters.items()
            if id(parameter) not in held and parameter.dim() > 1
        }
        patched = list(self.weights.parameters())
        weights |= {
            id(p): Weight(layer.info.name, True, tuple(p.shape), layer.compiled) for p, layer in patched
        }
        own = (*parameters.values(), *self.root.buffers(), *(p for p, _ in patched))
        return audit(nodes, weights, own, since)

    def look_again(self) -> None:
        """Lets the next forwards be audited as the first ones were."""
        for module in self.root.modules():
            if (mark := mark_of(module)) is not None:
                mark.seen.clear()
                mark.audited.clear()

    def _audit_forward(self, mode: _Mode, outermost: Running, inputs: object, output: object) -> None:
        """Looks into the graph of a forward that did what none had done before: that called a function for
        the first time, or was the first in this training mode, or with something upstream of its inputs."""
        upstream = any(torch_internals.requires_grad(tensor) for tensor in tensors_in(inputs, objects=False))
        kind = (outermost.module.training, upstream)
        if not self.enabled or (not mode.new and kind in outermost.mark.audited):
            return
        nodes = graph_of(output)
        findings = self.audit(nodes, mode.since) if nodes else []
        self._tell_new_layers()
        if patched := [finding for finding in findings if finding.patched]:
            self.look_again()
            raise exact_use(patched[0].name, patched[0].operation)
        self._tell_unpatchable(findings)
        self.backwards.due = True
        outermost.mark.audited.add(kind)
        for seen, function in mode.new:
            seen.add(function)

    def _tell_unpatchable(self, findings: list[Finding]) -> None:
        new = [finding for finding in findings if finding.name not in self._told]
        if new:
            self._told.update(finding.name for finding in new)
            names = ", ".join(f"{finding.name!r} ({finding.operation})" for finding in new)
            warn(
                "each of these weights belongs to no layer that can be patched, so its error signal stays "
                f"exact: {names}"
            )

    def _tell_unknown(self, function: str, weight: Tensor) -> None:
        """A frozen weight leaves no trace in what is computed from it: it can only be said that it may be."""
        if not self.enabled or weight.requires_grad or isinstance(weight, nn.Parameter):
            return
        key = f"{function} {tuple(weight.shape)}"
        if key in self._told or any(weight is buffer for buffer in self.root.buffers()):
            return
        frozen = [
            layer
            for p, layer in self.weights.parameters()
            if not p.requires_grad and p.numel() == weight.numel()
        ]
        if not frozen:
            return
        self._told.add(key)
        warn(
            f"{function} is called with a weight of shape {tuple(weight.shape)} of unknown origin. If it was "
            f"computed from the frozen weight of {frozen[0].info.name!r}, its error signal is exact; a "
            "weight that requires a gradient is followed"
        )

    def _tell_new_layers(self) -> None:
        new = {
            name: module for name, module in layers_in(self.root).items() if module not in self._known_layers
        }
        if new:
            self._known_layers.update(new.values())
            names = ", ".join(map(repr, new))
            warn(
                f"these layers were added after patching, so their error signals stay exact: {names}. To "
                "reroute them, remove the patch, and patch again"
            )

    def _check_opaque(self, ended: Running, output: object) -> None:
        """A weight that is no plain dense tensor may be used where nobody sees it, as by a kernel."""
        layer = self.own.get(ended.mark.path)
        if layer is None or layer.calls > ended.calls or not self.enabled or not layer.is_opaque():
            return
        if graph_of(output):
            raise ExactGradientError(
                f"{layer.info.name!r} has run without a call that could be rerouted: it keeps its weight as "
                f"{layer.weight_type()}, and computes with it where the patch does not see it. "
                f"exclude={[layer.info.name]} in feedbackhook.patch leaves it exact"
            )

    def _resolve(self, layers: list[Layer]) -> None:
        """Sees that today's parameters are known and guarded, and that steps of optimizers are heard."""
        if self._clock is None:
            self._clock = Clock(self, Bracket.before_step, Bracket.after_step)
        if self.weights.update(layers):
            self._place()
            self.look_again()

    def _check_tree(self) -> None:
        """Raises if a patched module is no longer in the model; what took its place would be exact."""
        if all(parent._modules.get(name) is child for parent, name, child in self._tree):
            return
        present = {id(module) for module in self.root.modules()}
        for layer in self.layers:
            for target in layer.targets:
                if id(target.module) not in present:
                    raise RuntimeError(
                        f"{target.info.name!r} was replaced after patching, and what took its place would "
                        "keep exact backprop: remove the patch, and patch again"
                    )

    # --- an optimizer's step -------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step: the watches are told, if it holds a patched weight."""
        if self.watches and self._held(optimizer):
            for watch in list(self.watches):
                watch.before_step(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped: layers whose weight it holds and whose rule asks for it redraw."""
        if not self.watches and not any(redrawn_by_updates(layer.feedback.rule) for layer in self.layers):
            return  # nothing follows the step, which need not be looked into
        held = self._held(optimizer)
        for layer in held:
            if redrawn_by_updates(layer.feedback.rule):
                layer.feedback.redraw()
        if held:
            for watch in list(self.watches):
                watch.after_step(optimizer)

    def _held(self, optimizer: Optimizer) -> list[Layer]:
        """The layers whose weight the optimizer holds."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [layer for layer in self.layers if any(id(p) in held for p in layer.parameters())]


_NO_EXPORT = (
    "a patched model cannot be traced or exported (torch.jit.trace, torch.export, ONNX): what comes out "
    "would train with exact backprop. Remove the patch first (feedbackhook.unpatch(model)); forward outputs "
    "are the same without it"
)
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _refuse(layer: Layer, call: Call) -> None:
    """Raises where the tensors of a call are of a kind that the edge cannot take."""
    if type(call.weight) is not nn.Parameter and hasattr(call.weight, "device_mesh"):
        raise RuntimeError(
            f"the weight of {layer.info.name!r} is sharded while it is used (a DTensor, as of tensor "
            f"parallelism), and V is not: exclude={[layer.info.name]} in feedbackhook.patch"
        )
    if call.input.is_nested and call.input.layout is torch.strided:
        raise RuntimeError(
            f"the input of {layer.info.name!r} is a nested tensor of the strided layout, which "
            "torch.autograd.Function does not take: make it with layout=torch.jagged, or "
            f"exclude={[layer.info.name]} in feedbackhook.patch"
        )


def _ancestors(name: str) -> Iterator[str]:
    """The full names of a module's ancestors, the root ("") first, and its own last."""
    yield ""
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
