"""The machinery: module hooks that bracket a forward, a function mode inside it, and the guard.

Hooks on each patched module and on each of its ancestors keep a stack of the modules that are running in
this thread. While it is not empty a `TorchFunctionMode` sees every call of the functions in
`products.OPERATIONS` with the weight that the call really uses. A call of a patched weight runs on the
detached input, so that PyTorch's own backward yields the weight and bias gradients alone, and the feedback
edge joins its output to the input. A hook on each weight is the guard: a gradient that no bracketed call made
is an error.

Under `torch.compile` the hooks, the mode and the edge are traced; counts, probes and the search for new
parameters, which are for the eye and for eager code, are left out of the graph.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from feedbackhook.edge import Layer, View, join
from feedbackhook.guard import (
    MATRIX_PRODUCTS,
    Guard,
    forget_compiled_code,
    refuse_derived,
    refuse_product,
    warn_of_exact,
)
from feedbackhook.products import OPERATIONS, Call
from feedbackhook.rules import redrawn_by_updates
from feedbackhook.targets import Target

if TYPE_CHECKING:
    from feedbackhook.watch import Watch

MARK = "_feedbackhook"
"""The one attribute that is set on modules: on each that is patched and on each of their ancestors."""


class Mark(NamedTuple):
    """What a hooked module carries: the user's handle, the bracket, the layer whose `weight` the module holds
    (if it does) and the layers inside it."""

    patch: Any
    bracket: Bracket
    layer: Layer | None
    inside: list[Layer]


class Use(NamedTuple):
    """What a call uses: a layer's whole weight, of which the weight in the call may be a view."""

    layer: Layer
    weight: Tensor
    view: View | None


class _Mode(TorchFunctionMode):
    """Hands the calls of the functions in `OPERATIONS` to the bracket and passes all others through.

    One lives from the opening of the outermost module to its end. It holds the stack of the modules that are
    running, so that the stack belongs to a thread, as the stack of modes does, and ends with its mode.
    """

    def __init__(self, bracket: Bracket) -> None:
        super().__init__()
        self.bracket = bracket
        self.running: list[tuple[nn.Module, FrameType | None]] = []  # and who calls it; None while traced

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)  # most calls, and so the quickest way
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        read = OPERATIONS.get(func)
        if read is None:
            if func is F.multi_head_attention_forward:
                with self:
                    return _attention(*args, **kwargs)
            if not torch.compiler.is_compiling():
                refuse_product(self.bracket, func, args)
            return func(*args, **kwargs)
        call = read(*args, **kwargs)
        used = self.bracket.layer_of(call.weight, self.running[-1][0])
        if used is None:
            if not torch.compiler.is_compiling():
                refuse_derived(self.bracket, func, call)
                warn_of_exact(self.bracket, func, call)
            return func(*args, **kwargs)
        return _reroute(self.bracket, used, call, func, args, kwargs)


_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's attention, which is one call to a function mode, without the question that hands it to the mode:
run inside the mode again, it shows its projections."""


_WATCHED = frozenset({*OPERATIONS, *MATRIX_PRODUCTS, F.multi_head_attention_forward})


def _reroute(
    bracket: Bracket, used: Use, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    layer = used.layer
    compiling = torch.compiler.is_compiling()
    if compiling:
        layer.compiled = True
        layer.feedback.parts(used.weight)  # a traced backward may keep nothing, so what is kept is made here
    else:
        if layer.depth is None:
            layer.depth = sum(other.depth is not None for other in bracket.layers)
        layer.calls += 1
        layer.upstream = layer.upstream or call.input.requires_grad
    if not call.input.requires_grad or not bracket.enabled:
        output: Tensor = func(*args, **kwargs)
        if output.requires_grad and not compiling:
            exact, shape = call.input.requires_grad, output.shape
            # An in-place activation gives a view another node, which would leave the hook behind.
            made = output if output._base is None else output._base
            made.register_hook(
                lambda error: layer.arrived() if exact else layer.error_signal(None, error.reshape(shape))
            )
        return output
    detached = call.input.detach()
    output = func(detached, *args[1:], **kwargs) if args else func(**{**kwargs, "input": detached})
    return join(output, call.input, used.weight.detach(), used.view, bracket, layer, call)


class Bracket:
    """All hooks of one patch and their state.

    Args:
        layers: the patched weights.

    Attributes:
        enabled: where False, forwards build plain graphs, and the guard lets any gradient pass.
        exact: where True, backwards use W in the place of V.
        observers: each is told, for every error signal that V sends on, the layer and the products of V and
            of W with it.
        watches: each is told when an optimizer that holds a patched weight is about to step, and when it has.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self.enabled = True
        self.exact = False
        self.observers: list[Callable[[Layer, Tensor, Tensor], None]] = []
        self.watches: list[Watch] = []
        self._by_weight: dict[int, tuple[Tensor, Layer]] = {}
        self._traced_mode = _Mode(self)
        self._hooks: list[RemovableHandle] = []
        self._guards: dict[Tensor, RemovableHandle] = {}
        self._clock: list[RemovableHandle] = []
        self._known_weights: dict[Layer, list[Tensor]] = {}
        self.judged: set[tuple[str, tuple[int, ...], int | None]] = set()
        self.roots: list[nn.Module] = []
        self._tree: list[tuple[nn.Module, str, nn.Module]] = []

    def attach(
        self, model: nn.Module, layer_of_target: Iterable[tuple[Target, Layer]], patch: object
    ) -> None:
        """Hooks the module of each target and each of its ancestors; `patch` is the user's handle, which
        their marks carry."""
        self.roots.append(model)
        inside: dict[str, list[Layer]] = {}
        own: dict[str, Layer] = {}
        for target, layer in layer_of_target:
            if target.attribute == "weight":
                own[target.path] = layer
            for ancestor in _ancestors(target.path):
                inside.setdefault(ancestor, []).append(layer)
        for name, layers in inside.items():
            module = model.get_submodule(name)
            if name:
                parent, _, key = name.rpartition(".")
                self._tree.append((model.get_submodule(parent), key, module))
            module.__dict__[MARK] = Mark(patch, self, own.get(name), layers)
            self._hooks += [
                module.register_forward_pre_hook(self._open, prepend=True),
                module.register_forward_hook(self._close, always_call=True),
            ]
        self._resolve(self.layers)
        forget_compiled_code()

    @property
    def attached(self) -> bool:
        """Whether its hooks are on a model."""
        return bool(self._hooks)

    def detach(self, model: nn.Module) -> None:
        """Takes away every hook, mark and guard, and a mode that an interrupted forward has left behind."""
        if (mode := self._mode()) is not None:
            _leave(mode)
        for watch in list(self.watches):
            watch.remove()
        for handle in (*self._hooks, *self._guards.values(), *self._clock):
            handle.remove()
        self._hooks.clear()
        self._clock.clear()
        _take_off_the_retired()
        self._guards.clear()
        self._by_weight.clear()
        self._known_weights.clear()
        for module in model.modules():
            mark = module.__dict__.get(MARK)
            if mark is not None and mark.bracket is self:
                del module.__dict__[MARK]
        forget_compiled_code()

    def layer_of(self, weight: Tensor, running: nn.Module) -> Use | None:
        """The patched layer to which a weight in a call belongs; `running` is the innermost hooked module.

        A parameter belongs to itself, wherever it is used, and so do its views: attention uses a third of
        its projection at a time. A weight that is derived from parameters (standardised, normalised,
        reparametrised) belongs to the module whose forward is running.
        """
        if (layer := self.known(weight)) is not None:
            return Use(layer, weight, None)
        base = weight._base
        if base is not None and base.is_contiguous() and (layer := self.known(base)) is not None:
            offset = weight.storage_offset() - base.storage_offset()
            return Use(layer, base, View(weight.size(), weight.stride(), offset))
        mark: Mark = running.__dict__[MARK]
        layer = mark.layer
        if layer is not None and layer.may_derive(weight):
            if not torch.compiler.is_compiling():
                layer.use(weight)
            return Use(layer, weight, None)
        return None

    def known(self, weight: Tensor) -> Layer | None:
        known, layer = self._by_weight.get(id(weight), (None, None))
        return layer if known is weight else None

    def _open(self, module: nn.Module, args: object) -> None:
        mode = self._mode()
        if mode is None and not torch.is_grad_enabled():
            return  # no graph is built; a module inside that enables gradients opens a bracket of its own
        if torch.compiler.is_compiling():
            if mode is None:
                # A mode that is on the stack where a traced graph breaks must be one that it did not make.
                mode = self._traced_mode
                mode.running.clear()
                mode.__enter__()  # type: ignore[no-untyped-call]
            mode.running.append((module, None))
            return
        caller = sys._getframe(1)
        if mode is not None and not _is_running(mode.running[-1][1], caller):
            _leave(mode)  # left behind by an interrupt, of which no hook hears
            mode = None
        if mode is None:
            mode = self._outermost(module)
        mode.running.append((module, caller))

    def _outermost(self, module: nn.Module) -> _Mode:
        """Begins a bracket with a module that no other hooked one has called."""
        if module.__dict__.get("_is_replica"):
            raise RuntimeError(
                "a patched model cannot run under nn.DataParallel, whose replicas share one feedback; use "
                "torch.nn.parallel.DistributedDataParallel"
            )
        self._check_tree()
        self._resolve(module.__dict__[MARK].inside)
        mode = _Mode(self)
        mode.__enter__()  # type: ignore[no-untyped-call]
        return mode

    def _close(self, module: nn.Module, args: object, output: object) -> None:
        mode = self._mode()
        if mode is None:
            return
        if mode.running[-1][0] is not module:
            if all(running is not module for running, _ in mode.running):
                return
            while mode.running[-1][0] is not module:
                mode.running.pop()  # a module inside it raised before its own hook could close it
        mode.running.pop()
        if not mode.running:
            _leave(mode)

    def _mode(self) -> _Mode | None:
        """This thread's mode of this bracket, while one of its modules is running."""
        if not torch.compiler.is_compiling():
            if not (depth := torch._C._len_torch_function_stack()):
                return None
            top = torch._C._get_function_stack_at(depth - 1)
            if type(top) is _Mode and top.bracket is self:
                return top  # the usual case, and quick
        for mode in _get_current_function_mode_stack():
            if isinstance(mode, _Mode) and mode.bracket is self:
                return mode
        return None

    def _resolve(self, layers: list[Layer]) -> None:
        """Sees that today's parameters are known and guarded: copies and `assign=True` bring new ones."""
        if not self._clock:
            _take_off_the_retired()
            self._clock = [
                register_optimizer_step_pre_hook(_Clock(self, Bracket.before_step)),
                register_optimizer_step_post_hook(_Clock(self, Bracket.after_step)),
            ]
            for handle in self._clock:
                weakref.finalize(self, _RETIRED.append, handle)
        for layer in layers:
            if self._is_resolved(layer):
                continue
            today = list(layer.parameters())
            for weight in self._known_weights.get(layer, []):
                if not any(weight is known for known in today):
                    self._by_weight.pop(id(weight), None)
                    if (guard := self._guards.pop(weight, None)) is not None:
                        guard.remove()
            self._known_weights[layer] = today
            if (plain := layer.plain_weight()) is not None:
                self._by_weight[id(plain)] = (plain, layer)
            for weight in today:
                if weight.requires_grad and weight not in self._guards:
                    self._guards[weight] = weight.register_hook(Guard(self, layer))

    def _is_resolved(self, layer: Layer) -> bool:
        """Whether a layer's plain weight is the one that is known and guarded."""
        plain = layer.plain_weight()
        if plain is None or self.known(plain) is not layer:
            return False
        return plain in self._guards or not plain.requires_grad

    def _check_tree(self) -> None:
        """Raises if a patched module is no longer in the model; what took its place would be exact."""
        if all(parent._modules.get(name) is child for parent, name, child in self._tree):
            return
        present = {id(module) for root in self.roots for module in root.modules()}
        for layer in self.layers:
            if id(layer.module) not in present:
                raise RuntimeError(
                    f"{layer.info.name!r} was replaced after patching, and what took its place would keep "
                    "exact backprop: remove the patch, and patch again"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave behind what belongs to this process's parameters and optimizers."""
        own: dict[str, Any] = {"_by_weight": {}, "_known_weights": {}, "_guards": {}, "_clock": []}
        return {**self.__dict__, **own, "observers": [], "watches": []}

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


_RETIRED: list[RemovableHandle] = []
"""Clocks of brackets that were collected without a `remove()`. They do nothing any more, and stay until the
next patch: the collector may run while an optimizer walks torch's dict of hooks, which then must not
change."""


def _take_off_the_retired() -> None:
    while _RETIRED:
        _RETIRED.pop().remove()


class _Clock:
    """A hook on every optimizer's step, which does not keep the bracket alive."""

    def __init__(self, bracket: Bracket, tell: Callable[[Bracket, Optimizer], None]) -> None:
        self._bracket, self._tell = weakref.ref(bracket), tell

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if (bracket := self._bracket()) is not None:
            self._tell(bracket, optimizer)


def _ancestors(name: str) -> Iterator[str]:
    """The full names of a module's ancestors, the root ("") first, and its own last."""
    yield ""
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _is_running(wanted: FrameType | None, frame: FrameType | None) -> bool:
    """Whether the wanted frame is among those that led to `frame`. Of compiled code none is known, which
    counts as running."""
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


def _leave(mode: TorchFunctionMode) -> None:
    """Takes a mode off the stack, from under whatever was put there after it."""
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
