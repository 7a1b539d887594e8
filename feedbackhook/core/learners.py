"""What rules that learn need beside their formulas: checks at the first optimizer step, mirror phases after
steps, and means over processes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.errors import warn
from feedbackhook.core.feedback import Feedback
from feedbackhook.core.layer import Layer, Patched
from feedbackhook.core.learning import learns, mirrors, reads_calls
from feedbackhook.core.state import PatchState
from feedbackhook.core.torch_internals import after_backward, current_backward, running_ddp, steps_for_scaler

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Learners:
    """The layers of a patch whose feedback learns, and a listener to optimizer steps.

    Args:
        state: the patch's.
    """

    def __init__(self, state: PatchState) -> None:
        self._state = weakref.ref(state)
        self._checked: list[nn.Parameter] = []  # the learned tensors at the last check
        self._hooked: list[tuple[nn.Parameter, RemovableHandle]] = []
        self._groups: Sequence[ProcessGroup] | None = None  # None: not under DistributedDataParallel
        self._due: set[int] = set()
        self.averaged = False

    # --- optimizer steps -----------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """Check that an optimizer steps what is learned, before the first step that updates a patched weight.

        Raises:
            RuntimeError: none does, so that V would stay as it is; or a GradScaler does, for gradients that
                do not carry its scale.
        """
        if (layers := self._layers()) and not torch.compiler.is_compiling():
            self._refuse_scaler(layers, optimizer)
            if self._is_first(layers, optimizer):
                _check_held(layers, optimizer, self._handed_out())

    def after_step(self, optimizer: Optimizer) -> None:
        """Warn of what did not learn in the first step, and run the mirror phases that are due."""
        if not (layers := self._layers()) or torch.compiler.is_compiling():
            return
        if self._is_first(layers, optimizer):
            self._checked = list(_parameters(layers))
            _warn_of_idle(layers)
            self._warn_of_processes(layers)
        if any(mirrors(layer.feedback.rule) for layer in layers):
            state = self._state()
            assert state is not None
            for layer in state.held_by(optimizer):
                if isinstance(layer, Layer) and mirrors(layer.feedback.rule):
                    _mirror_if_due(layer)

    def _layers(self) -> list[Patched]:
        state = self._state()
        return [] if state is None else learning_layers(state)

    def _handed_out(self) -> bool:
        state = self._state()
        return state is not None and state.handed_out

    def _is_first(self, layers: list[Patched], optimizer: Optimizer) -> bool:
        """Whether this is the first step that updates a patched weight with these learned tensors."""
        state = self._state()
        current = list(_parameters(layers))
        same = len(current) == len(self._checked)
        if same and all(a is b for a, b in zip(current, self._checked, strict=True)):
            return False
        return state is not None and bool(state.held_by(optimizer))

    def _refuse_scaler(self, layers: list[Patched], optimizer: Optimizer) -> None:
        held = _held(optimizer)
        for layer in layers:
            rule = layer.feedback.rule
            mine = any(id(p) in held for p in _parameters([layer]))
            if learns(rule) and rule.learns_from == "activity" and mine and steps_for_scaler():
                raise RuntimeError(
                    f"a GradScaler divided the gradients of the V of {layer.info.name!r} by its scale, "
                    f"but those of {type(rule).__name__} do not carry it, since they do not follow from the "
                    "loss. Give patch.parameters() an optimizer of their own, and call its step() directly"
                )

    def _warn_of_processes(self, layers: list[Patched]) -> None:
        if _processes() > 1 and not self.averaged and any(p.grad is not None for p in _parameters(layers)):
            warn(
                f"{_processes()} processes train, but the gradients of what the feedback has learned are "
                "those of each process alone; call patch.average_gradients() before each optimizer step"
            )

    # --- several processes ---------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """Find out, at the start of a forward, over which processes its gradients will be averaged."""
        if _processes() < 2 or not (layers := self._layers()):
            return
        ddp = running_ddp()
        self._groups = None
        if ddp is not None:
            self._groups = (ddp.process_group,) if ddp.require_backward_grad_sync else ()
            self.averaged = True
        parameters = [p for p in _parameters(layers) if p.requires_grad]
        if [id(p) for p in parameters] != [id(p) for p, _ in self._hooked]:
            self.clear()
            self._hooked = [(p, p.register_post_accumulate_grad_hook(self._arrived)) for p in parameters]

    def clear(self) -> None:
        """Remove the hooks on learned tensors."""
        for _, hook in self._hooked:
            hook.remove()
        self._hooked = []

    def _arrived(self, parameter: Tensor) -> None:
        """Average the gradients when the running backward ends, as DistributedDataParallel does."""
        if (running := current_backward()) in self._due or self._groups == ():
            return
        self._due.add(running)
        groups = self._groups

        def average() -> None:
            self._due.discard(running)
            # Under fully_shard, weights show their mesh only now that they are sharded again.
            found = _sharding_groups(self._layers()) if groups is None else groups
            if found:
                self.average(found)

        after_backward(average)

    def average(self, groups: Iterable[ProcessGroup | None] = (None,)) -> None:
        """Replace the gradients of all learned tensors by their means over the processes of each group."""
        self.averaged = True
        parameters = [p for p in _parameters(self._layers()) if p.requires_grad]
        for dtype, device in sorted({(p.dtype, p.device) for p in parameters}, key=str):
            same = [p for p in parameters if (p.dtype, p.device) == (dtype, device)]
            for group in groups:
                _average(same, group)


def learning_layers(state: PatchState) -> list[Patched]:
    """Return the layers and sites whose rule learns."""
    return [each for each in state.patched if learns(each.feedback.rule)]


def learned_parameters(state: PatchState) -> Iterator[nn.Parameter]:
    """Yield all learned tensors."""
    yield from _parameters(learning_layers(state))


def mirror(layer: Layer, steps: int) -> None:
    """Run steps of a layer's mirror phase: its rule changes the learned tensors, from noise of its own."""
    feedback = cast(Feedback, layer.feedback)
    feedback.mirror(layer.weight().detach(), steps)


def _mirror_if_due(layer: Layer) -> None:
    feedback = cast(Feedback, layer.feedback)
    feedback.updates += 1
    every = getattr(feedback.rule, "every", None)
    if every is not None and feedback.updates % every == 0:
        mirror(layer, getattr(feedback.rule, "steps", 1))


def _parameters(layers: Iterable[Patched]) -> Iterator[nn.Parameter]:
    for layer in layers:
        yield from layer.feedback.learned.values()


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _check_held(layers: list[Patched], optimizer: Optimizer, handed_out: bool) -> None:
    """Raise if what a layer learns is changed by no one."""
    held = _held(optimizer)
    alone = []
    for layer in layers:
        feedback = layer.feedback
        if not reads_calls(feedback.rule):
            if not getattr(feedback, "mirrored", 0) and getattr(feedback.rule, "every", None) is None:
                raise RuntimeError(
                    f"the feedback of {layer.info.name!r} has not learned anything, since "
                    f"{type(feedback.rule).__name__} learns in a mirror phase. Call patch.mirror(steps=...) "
                    "before the optimizer's first step, or set the rule's option every="
                )
        elif layer.input_requires_grad is not False and not all(
            id(p) in held or (handed_out and _in_a_group(p)) for p in feedback.learned.values()
        ):
            alone.append(layer.info.name)
    if alone:
        raise RuntimeError(
            f"{type(optimizer).__name__} is about to update the patched weights, but no optimizer holds what "
            f"the feedback of {', '.join(map(repr, alone))} has learned, so V would not learn: pass "
            "[*model.parameters(), *patch.parameters()] to the optimizer"
        )


def _in_a_group(parameter: nn.Parameter) -> bool:
    """Whether a parameter is in a parameter group of any optimizer."""
    for params in gc.get_referrers(parameter):
        if isinstance(params, list) and any(
            isinstance(group, dict) and group.get("params") is params for group in gc.get_referrers(params)
        ):
            return True
    return False


def _warn_of_idle(layers: list[Patched]) -> None:
    """Warn of layers whose feedback did not learn in the first step, and why."""
    for layer in layers:
        feedback, name = layer.feedback, layer.info.name
        rule = feedback.rule
        off = [n for n, p in feedback.learned.items() if not p.requires_grad] if reads_calls(rule) else []
        follows = learns(rule) and rule.learns_from == "gradient"
        if layer.calls == 0 and not layer.compiled:
            warn(f"{name!r} has not run before the optimizer's first step, so its feedback did not learn")
        elif off:
            warn(
                f"requires_grad is off for {', '.join(f'{name}.{n}' for n in off)}, so this does not learn; "
                "patch.freeze() keeps V as it is without this warning"
            )
        elif follows and not any(p.requires_grad for p in layer.parameters()):
            warn(
                f"{type(rule).__name__} moves V along W's own gradient, but the weight of {name!r} is "
                "frozen, so V stays as it is; 'WM' is a rule that also learns from a frozen weight"
            )


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _sharding_groups(layers: Iterable[Patched]) -> Sequence[ProcessGroup]:
    """Return the groups of the device mesh that a layer's weight is sharded over, as under FSDP2."""
    for layer in layers:
        for parameter in layer.parameters():
            if (mesh := getattr(parameter, "device_mesh", None)) is not None:
                groups: Sequence[ProcessGroup] = mesh.get_all_groups()
                return groups
    return ()


def _average(parameters: list[nn.Parameter], group: ProcessGroup | None) -> None:
    """Average gradients of one dtype over a group. One that no process has stays None."""
    here = [float(p.grad is not None) for p in parameters]
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    sizes = [part.numel() for part in flat]
    packed = torch.cat([*flat, flat[0].new_tensor(here)])
    torch.distributed.all_reduce(packed, group=group)
    *means, anywhere = packed.div_(torch.distributed.get_world_size(group)).split([*sizes, len(sizes)])
    for parameter, mean, found in zip(parameters, means, anywhere.tolist(), strict=True):
        if found and parameter.grad is not None:
            parameter.grad.copy_(mean.view_as(parameter))
        elif found:
            parameter.grad = mean.view_as(parameter).clone()
