"""The interceptor: module hooks around each forward, and a function mode inside it.

Hooks on each patched module and on each of its ancestors keep a stack of the modules that are running in this
thread. While this stack is not empty, a `TorchFunctionMode` sees every call of the functions in
`feedbackhook.core.operations` with the weight that the call really uses (`feedbackhook.core.calls`). What a
list of functions cannot cover, the audit of the graph finds (`feedbackhook.core.coverage`): it examines a
forward in which some module calls a function for the first time, and the backward that follows.

Under `torch.compile` the hooks, the mode and the edge are traced. Counts, probes, audits and the search for
new parameters belong to eager code and stay out of the graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from feedbackhook.core import torch_internals
from feedbackhook.core.by_hand import UpdatesByHand
from feedbackhook.core.calls import NO_COMPILE, Calls
from feedbackhook.core.coverage import Coverage
from feedbackhook.core.guard import BackwardAudits, SiteGuards
from feedbackhook.core.layer import Layer, ModuleSite
from feedbackhook.core.learners import Learners
from feedbackhook.core.marks import Link, Mark, mark_of
from feedbackhook.core.mode import Mode, Running
from feedbackhook.core.redraws import DrawAhead, Redraw
from feedbackhook.core.signals import Forward
from feedbackhook.core.sites import reroute_inputs
from feedbackhook.core.state import PatchState
from feedbackhook.core.steps import Clock
from feedbackhook.core.weights import Weights


class Interceptor:
    """The hooks of one patch.

    Args:
        root: the model to patch.
        layers: the patched weights.
        sites: the modules whose inputs are rerouted.
        output: as in `PatchState`.

    Attributes:
        patch: the user's handle.
        root: the patched model.
        state: what listeners subscribe to.
        coverage: finds and reports what is not rerouted.
        attached: whether the hooks are on the model.
        learners: the layers whose feedback learns.
    """

    patch: Any

    def __init__(
        self,
        root: nn.Module,
        layers: Iterable[Layer],
        sites: Iterable[ModuleSite] = (),
        output: str | None = None,
    ) -> None:
        self.root = root
        self.state = PatchState(layers, sites, output)
        self.attached = False
        self._weights = Weights(self.state.layers, self._guard)
        self.coverage = Coverage(root, self.state, self._weights)
        self._audits = BackwardAudits(self.state, self.coverage.audit, self.coverage.look_again)
        self._site_guards = SiteGuards(root, self.state, self.coverage.audit_all)
        self._calls = Calls(self.state, self._weights, self.coverage, self._follow_checkpoint)
        self._set_up()

    def _set_up(self) -> None:
        """Set what a copy cannot take along."""
        self._traced_mode = Mode(self._calls, traced=True)
        self._draw_ahead = DrawAhead()
        self._clock: Clock | None = None  # a copy starts its clock in its first intercepted forward
        self.state.listen_to_steps(Redraw(self.state))  # before all others
        self.learners = Learners(self.state)
        self.state.listen_to_steps(self.learners)
        self._by_hand = UpdatesByHand(self.state)

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_traced_mode", "_clock", "_draw_ahead", "_by_hand", "learners")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def _guard(self, layer: Layer) -> Callable[[torch.Tensor], None]:
        return self._audits.guard(layer)

    # --- attach and detach ---------------------------------------------------------------------------------

    def attach(self, patch: object) -> None:
        """Put hooks on the module of each layer and on each of its ancestors.

        Args:
            patch: the user's handle.
        """
        self.patch = patch
        link = Link(self)
        for name in self.state.paths():
            Mark(link, name, self.root.get_submodule(name), name in self.state.site_at)
        self.attached = True
        self._update(self.state.layers)
        torch_internals.forget_compiled_code()

    def detach(self) -> None:
        """Remove hooks, marks, guards and listeners, and a mode that an interrupted forward left behind."""
        if (mode := self._mode()) is not None:
            torch_internals.take_off(mode)
        self.state.drop_listeners()
        if self._clock is not None:
            self._clock.stop()
            self._clock = None
        self._weights.clear()
        self._site_guards.clear()
        self.learners.clear()
        for module in self.coverage.patched_modules():
            mark = mark_of(module)
            if mark is not None and mark.link.owner is self:
                mark.take_off(module)
        self.attached = False
        torch_internals.forget_compiled_code()

    def _update(self, layers: list[Layer]) -> None:
        """Make sure that the current parameters of these layers are known and guarded, and that the optimizer
        clock runs."""
        if self._clock is None:
            self._clock = Clock(self.state)
        self._site_guards.update()
        if self._weights.update(layers):
            self.state.index_layers()
            self.coverage.look_again()

    # --- a module's forward --------------------------------------------------------------------------------

    def open(self, mark: Mark, module: nn.Module) -> None:
        """A hooked module's forward is about to run."""
        mode = self._mode()
        if mode is None and torch_internals.is_exporting():
            raise RuntimeError(_NO_EXPORT)
        if mode is None and not torch.is_grad_enabled():
            return  # no graph is built; a module inside that enables gradients becomes the outermost one
        if torch.compiler.is_compiling():
            self._open_traced(mode, mark, module)
            return
        caller = torch_internals.caller(2)
        if mode is not None and not torch_internals.is_running(mode.running[-1].caller, caller):
            torch_internals.take_off(mode)  # left behind by an interrupt, which skips the hooks
            mode = None
        if mode is None:
            if torch_internals.is_replica(module):
                raise RuntimeError(_NO_REPLICAS)
            self.coverage.check_tree()
            inside = self.state.inside.get(mark.path, [])
            self._update(inside)
            self._by_hand.before_forward()
            self._draw_ahead.before_forward(inside)
            self.learners.begin_forward()
            mode = Mode(self._calls)
            if self.state.output is not None:
                mode.forward = Forward(self.state)
            mode.__enter__()  # type: ignore[no-untyped-call]
        layer = self.state.own.get(mark.path)
        mode.begin(Running(module, mark, caller, 0 if layer is None else layer.calls))

    def _open_traced(self, mode: Mode | None, mark: Mark, module: nn.Module) -> None:
        if self.state.output is not None and self.state.enabled:
            raise RuntimeError(NO_COMPILE.format(mark.path or type(module).__name__))
        if mode is None:
            # Where a traced graph breaks, a mode on the stack must be one that the graph did not create.
            mode = self._traced_mode
            mode.running.clear()
            mode.__enter__()  # type: ignore[no-untyped-call]
        mode.running.append(Running(module, mark, None, 0))

    def enter(
        self, mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward of a site's module is about to run."""
        mode = self._mode()
        if mode is None or not self.state.enabled:
            return None
        site = self.state.site_at[mark.path]
        site.ran = True
        if not torch.is_grad_enabled() or torch_internals.saves_through_hooks():
            self._follow_checkpoint(mode)
        if not torch.is_grad_enabled():
            return None
        return reroute_inputs(self.state, site, mode, args, kwargs)

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
        self.coverage.check_opaque(ended, output)
        if mode.forward is not None:
            self._end_forward(mode, mode.forward, ended, output)
        if not mode.running:
            self._audit(mode, ended, inputs, output)

    def _end_forward(self, mode: Mode, forward: Forward, ended: Running, output: object) -> None:
        """Tell a forward of direct rules if its output has been computed, or if the outermost module ends."""
        if ended.mark.path == self.state.output and self.state.enabled and torch.is_grad_enabled():
            forward.end(output, examine=bool(mode.new))
        if not mode.running:
            forward.close()

    def _audit(self, mode: Mode, outermost: Running, inputs: object, output: object) -> None:
        if self.coverage.audit_forward(mode, outermost, inputs, output):
            self._audits.due = True

    def _mode(self) -> Mode | None:
        """Return this thread's mode of this patch while one of its modules is running."""
        if not torch.compiler.is_compiling():
            top = torch_internals.top_function_mode()
            if top is None or (type(top) is Mode and top.handler is self._calls):
                return top  # the usual cases, which must be fast
        for mode in torch_internals.function_modes():
            if isinstance(mode, Mode) and mode.handler is self._calls:
                return mode
        return None

    # --- checkpoints ---------------------------------------------------------------------------------------

    def _follow_checkpoint(self, mode: Mode) -> None:
        """Make a running checkpoint recompute under a mode like this one.

        It recomputes in the backward, where no module opens a mode if the checkpoint is of a function.
        """
        running, forward = tuple(mode.running), mode.forward

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def recompute(*args: Any, **kwargs: Any) -> Any:
                if self._mode() is not None or not self.attached:
                    return function(*args, **kwargs)
                with self._reopened(running, forward) as again:
                    output = function(*args, **kwargs)
                if again.forward is not None:
                    again.forward.hear(output)
                self._audit(again, running[-1], (args, kwargs), output)
                return output

            return recompute

        torch_internals.wrap_checkpoint(wrap)

    @contextmanager
    def _reopened(self, running: Iterable[Running], forward: Forward | None) -> Iterator[Mode]:
        """A mode in which these modules count as running, in a part of this forward."""
        mode = Mode(self._calls)
        mode.forward = None if forward is None else forward.again()
        for one in running:
            mode.begin(one._replace(caller=None))
        with mode:
            yield mode


_NO_EXPORT = (
    "a patched model cannot be traced or exported (torch.jit.trace, torch.export, ONNX), since the result "
    "would train with exact backprop. Remove the patch first (feedbackhook.unpatch(model)); forward outputs "
    "are the same without it"
)
_NO_REPLICAS = (
    "a patched model cannot run under nn.DataParallel, whose replicas share one feedback; use "
    "torch.nn.parallel.DistributedDataParallel"
)
