"""PyTorch's private names, all in one place, each behind a function that says what it is for.

`tests/test_torch_internals.py` checks each of them, so that a release of PyTorch that changes one is noticed
there by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType, FunctionType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

Node: TypeAlias = Any
"""A node of the autograd graph. (`torch.autograd.graph.Node` says too little of itself for a checker.)"""


# --- the backward that is running ------------------------------------------------------------------------


def current_backward() -> int:
    """The id of the backward that is running in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


def backward_roots() -> list[Node] | None:
    """The nodes at which the backward that calls us has begun; None if they cannot be found.

    On a CPU a backward runs below the Python call that started it. On a GPU it runs in a thread of its own
    while the thread of that call waits, so the calls of all threads are taken: one root too many does no
    harm to who looks for faults.
    """
    if (call := _call_of(_engine_run_backward.__code__, sys._getframe(1))) is not None:
        calls = [call]
    else:
        frames = sys._current_frames().values()
        found = (_call_of(_engine_run_backward.__code__, frame) for frame in frames)
        calls = [call for call in found if call is not None]
    roots = [_node_of(output) for call in calls for output in call.f_locals["t_outputs"]]
    return [node for node in roots if node is not None] or None


def _node_of(output: Any) -> Node | None:
    """That of a tensor, or of a `torch.autograd.graph.GradientEdge`."""
    return output.grad_fn if isinstance(output, Tensor) else output.node


def _call_of(code: Any, frame: FrameType | None) -> FrameType | None:
    """The innermost call of a function among those that led to `frame`."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


# --- checkpoints ------------------------------------------------------------------------------------------


def wrap_checkpoint(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Lets the checkpoint whose forward is running, if one is, call `wrap(function)` in the place of its
    function when it recomputes. A function that was wrapped before (it has `__wrapped__`) stays as it is."""
    if torch.is_grad_enabled():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        holder = None if hooks is None else _closure(hooks[0]).get("frame")
        if isinstance(holder, _CheckpointFrame) and not hasattr(holder.recompute_fn, "__wrapped__"):
            holder.recompute_fn = wrap(holder.recompute_fn)
    elif (call := _call_of(CheckpointFunction.forward.__code__, sys._getframe(1))) is not None:
        ctx = call.f_locals["ctx"]
        if not hasattr(ctx.run_function, "__wrapped__"):
            ctx.run_function = wrap(ctx.run_function)


def saves_through_hooks() -> bool:
    """Whether what autograd saves now goes through somebody's hooks, such as a checkpoint's."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _closure(function: Any) -> dict[str, Any]:
    """The variables of enclosing functions that a function uses; none for what is no function."""
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


# --- transforms and tracing -------------------------------------------------------------------------------


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def levels(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, and those inside the wrappers of torch.func, each of which may have a graph of its own."""
    yield tensor
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func has wrapped the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def requires_grad(tensor: Tensor) -> bool:
    """Whether the tensor, or one that torch.func has wrapped in it, requires a gradient."""
    if tensor.requires_grad:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(level.requires_grad for level in levels(tensor))


def is_exporting() -> bool:
    """Whether a graph is being made to be taken elsewhere: by `torch.export`, or by `torch.jit.trace`, which
    ONNX export without dynamo uses. A trap: PyTorch 2.10 and 2.11 answer True to
    `torch.compiler.is_exporting()` in whatever `torch.compile` compiles, so the flag behind it is read."""
    exporting: bool = torch.compiler._is_exporting_flag
    return exporting or torch._C._get_tracing_state() is not None


def forget_compiled_code() -> bool:
    """Lets `torch.compile` make its code anew, and see from now on whether a module has hooks: else code
    that was made before hooks came or went would be used on, and that of a plain model for a patched one of
    the same classes. True where the compiler is in use, and did not look at hooks before."""
    if "torch._dynamo" not in sys.modules:
        return False
    blind: bool = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()
    return blind


# --- function modes ----------------------------------------------------------------------------------------


def function_modes() -> list[TorchFunctionMode]:
    """The modes on this thread's stack, the outermost first."""
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()
    return modes


def top_function_mode() -> TorchFunctionMode | None:
    """The innermost mode on this thread's stack."""
    if not (depth := torch._C._len_torch_function_stack()):
        return None
    mode: TorchFunctionMode = torch._C._get_function_stack_at(depth - 1)
    return mode


def take_off(mode: TorchFunctionMode) -> None:
    """Takes a mode off the stack, from under whatever was put there after it."""
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


def caller(depth: int) -> FrameType:
    """The frame that many calls above that of whoever asks."""
    return sys._getframe(depth + 1)


def is_running(wanted: FrameType | None, frame: FrameType | None) -> bool:
    """Whether the wanted frame is among those that led to `frame`. Of compiled code none is known, which
    counts as running."""
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


# A trap: a `FunctionType` shares its globals' other names with torch, and none of its later changes.
multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's attention, which is one call to a function mode, without the question that hands it to the mode:
run inside the mode again, it shows its projections."""


# --- the graph ----------------------------------------------------------------------------------------------


def next_sequence_number() -> int:
    """What the next node of the graph made in this thread will have as its `sequence_number`, or less."""
    return torch._C._autograd._get_sequence_nr()


def sequence_number(node: Node) -> int:
    """Nodes made later in the same thread have larger ones; those that accumulate gradients the largest."""
    number: int = node._sequence_nr()
    return number


def saved_tensors(node: Node) -> Iterator[Tensor]:
    """The tensors that a node keeps for its backward: none of a node that is used up, and none that went
    through hooks, since asking for those would run the hooks (a checkpoint's would recompute)."""
    for name in _saved_names(type(node)):  # type: ignore[arg-type]  # a class can be hashed
        try:
            found = getattr(node, name)
        except RuntimeError:
            return  # used up
        for saved in found if isinstance(found, (tuple, list)) else (found,):
            if saved is not None and saved.unpack_hook is None and isinstance(saved.data, Tensor):
                yield saved.data


@cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def storage_of(tensor: Tensor) -> int | None:
    """What is the same for all tensors that share memory; None of one that has no memory of its own."""
    if tensor.layout is not torch.strided or tensor.is_nested or is_wrapped(tensor):
        return None
    storage: int = tensor.untyped_storage()._cdata
    return storage
