"""All private names of PyTorch that the library uses, each behind a function that says what it is for.

`tests/core/test_torch_internals.py` tests each of them, so that a release of PyTorch that changes one fails
there, by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType, FunctionType
from typing import Any, ParamSpec, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

P = ParamSpec("P")
Node: TypeAlias = Any
"""A node of the autograd graph. (`torch.autograd.graph.Node` is not typed well enough for a type checker.)"""


# --- the backward that is running ------------------------------------------------------------------------


def current_backward() -> int:
    """Return the id of the backward that is running in this thread, or -1 outside of one."""
    return torch._C._current_graph_task_id()


def after_backward(call: Callable[[], None]) -> None:
    """Call a function when the running backward has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def backward_roots() -> list[Node] | None:
    """Return the nodes where the running backward started, or None if they cannot be found.

    On a CPU, a backward runs below the Python call that started it. On a GPU, it runs in a separate thread
    while the thread of that call waits, so this returns the roots of the calls of all threads. An extra root
    does no harm in an audit.
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
    """Return the node of a tensor or of a `torch.autograd.graph.GradientEdge`."""
    return output.grad_fn if isinstance(output, Tensor) else output.node


def _call_of(code: Any, frame: FrameType | None) -> FrameType | None:
    """Return the innermost call of a function among those that led to `frame`."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


# --- checkpoints ------------------------------------------------------------------------------------------


def wrap_checkpoint(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Make the checkpoint whose forward is running, if any, recompute with `wrap(function)` instead of its
    function, and so all reentrant ones around it. A function that has been wrapped before (it has
    `__wrapped__`) stays as it is."""
    if torch.is_grad_enabled():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        holder = None if hooks is None else _closure(hooks[0]).get("frame")
        if isinstance(holder, _CheckpointFrame) and not hasattr(holder.recompute_fn, "__wrapped__"):
            holder.recompute_fn = wrap(holder.recompute_fn)
        return
    call: FrameType | None = sys._getframe(1)
    while (call := _call_of(CheckpointFunction.forward.__code__, call)) is not None:
        ctx = call.f_locals["ctx"]
        if hasattr(ctx.run_function, "__wrapped__"):
            return  # and so have those around it
        ctx.run_function = wrap(ctx.run_function)
        call = call.f_back


def saves_through_hooks() -> bool:
    """Whether hooks, such as those of a checkpoint, process what autograd saves now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _closure(function: Any) -> dict[str, Any]:
    """Return the closure variables of a function, or nothing if it is not a Python function."""
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


# --- transforms and tracing -------------------------------------------------------------------------------


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def levels(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor and those inside the wrappers of torch.func, each of which may have its own graph."""
    yield tensor
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func has wrapped the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def requires_grad(tensor: Tensor) -> bool:
    """Whether the tensor, or one inside the wrappers of torch.func, requires a gradient."""
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
    """Drop all code that `torch.compile` has made, and make it check from now on whether a module has hooks.

    Otherwise code compiled before hooks were added or removed would still run, and so would code of a plain
    model for a patched one of the same classes.

    Returns:
        Whether the compiler is in use and did not check hooks before.
    """
    if not compiler_is_loaded():
        return False
    blind: bool = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()
    return blind


def compile_in_place(module: nn.Module, **options: Any) -> None:
    """Make calls of a module run code that `torch.compile` has made, as `module.compile(**options)` does.

    Up to PyTorch 2.11 that begins with a function of PyTorch's own, which the compiler skips: of a module
    such as `nn.Sequential` nothing is compiled, and of hooks only pieces. Here it begins with another one.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **options)


def run_while_compiling(method: Callable[P, bool]) -> Callable[P, bool]:
    """Make `torch.compile` run a method when it traces a call of it, and leave the call out of the graph.

    `torch.compiler.assume_constant_result` does the same, but loads the compiler. The result is kept as a
    global of the compiled function's module, so no module may have the method's name as another global.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


def compiler_is_loaded() -> bool:
    """Whether this process may have compiled code."""
    return "torch._dynamo" in sys.modules


# --- modules and tensors -----------------------------------------------------------------------------------


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter that the module itself registers, or None if it has none of this name."""
    return module._parameters.get(name)


def own_buffer(module: nn.Module, name: str) -> Tensor | None:
    """Return a buffer that the module itself registers, or None if it has none of this name."""
    return module._buffers.get(name)


def contents_of(tensor: Tensor) -> int:
    """Return a number that changes if `torch.utils.swap_tensors` gives a tensor the contents of another, as
    `load_state_dict` and `to` do in some cases."""
    number: int = tensor._cdata
    return number


def attach_hooks_again(tensor: Tensor) -> None:
    """Make the hooks on a tensor's gradient run again after its contents were swapped, which takes them to
    the other tensor."""
    tensor._backward_hooks = tensor._backward_hooks


def own_child(module: nn.Module, name: str) -> nn.Module | None:
    """Return a module that the module itself registers, or None if it has none of this name."""
    return module._modules.get(name)


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made the module as one of its replicas."""
    return bool(module.__dict__.get("_is_replica"))


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that this one is a view of, or None if it is not a view."""
    base: Tensor | None = tensor._base
    return base


def version_of(tensor: Tensor) -> int:
    """Return a number that grows with each in-place change of the tensor."""
    return tensor._version


foreach_mul_ = torch._foreach_mul_
foreach_sub_ = torch._foreach_sub_
foreach_add_ = torch._foreach_add_
foreach_sign = torch._foreach_sign
foreach_sign_ = torch._foreach_sign_


# --- DistributedDataParallel -------------------------------------------------------------------------------


def awaits_first_backward(node: Node) -> bool:
    """Whether a node belongs to DistributedDataParallel with `static_graph=True` before its first backward,
    which records the order in which gradients arrive."""
    ddp = node.ddp_weakref() if hasattr(node, "ddp_weakref") else None
    return ddp is not None and ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued


def running_ddp() -> Any | None:
    """Return the DistributedDataParallel whose forward is running, or None."""
    if not torch.distributed.is_available():
        return None
    return DistributedDataParallel._active_ddp_module


# --- optimizers --------------------------------------------------------------------------------------------


def steps_for_scaler() -> bool:
    """Whether a GradScaler, which has divided the gradients by its scale, is stepping the optimizer."""
    call = _call_of(GradScaler.step.__code__, sys._getframe(1))
    return call is not None and bool(call.f_locals["self"].is_enabled())


# --- function modes ----------------------------------------------------------------------------------------


def function_modes() -> list[TorchFunctionMode]:
    """Return the modes on this thread's stack, the outermost first."""
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()
    return modes


def top_function_mode() -> TorchFunctionMode | None:
    """Return the innermost mode on this thread's stack, or None if there is none."""
    if not (depth := torch._C._len_torch_function_stack()):
        return None
    mode: TorchFunctionMode = torch._C._get_function_stack_at(depth - 1)
    return mode


def take_off(mode: TorchFunctionMode) -> None:
    """Remove a mode from the stack, also from under modes that were added after it."""
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


def caller(depth: int) -> FrameType:
    """Return the frame `depth` calls above the caller's frame."""
    return sys._getframe(depth + 1)


def stacklevel_outside(*packages: str) -> int:
    """Return the `stacklevel` with which the caller warns at the first frame outside these packages."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(packages):
        depth, frame = depth + 1, frame.f_back
    return depth


def is_running(wanted: FrameType | None, frame: FrameType | None) -> bool:
    """Whether `wanted` is among the frames that led to `frame`. None, the frame of compiled code, counts as
    running."""
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


# A trap: the copied globals do not follow later changes of torch's own.
multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
"""PyTorch's attention without the check that hands it to a function mode as a single call. Run inside the
mode again, it shows its projections."""


# --- the graph ----------------------------------------------------------------------------------------------


def next_sequence_number() -> int:
    """Return a lower bound of the `sequence_number` of the next graph node made in this thread."""
    return torch._C._autograd._get_sequence_nr()


def sequence_number(node: Node) -> int:
    """Return a number that grows with each node made in a thread. AccumulateGrad nodes have the largest."""
    number: int = node._sequence_nr()
    return number


def saved_tensors(node: Node) -> Iterator[Tensor]:
    """Yield the tensors that a node keeps for its backward.

    A node that is used up has none. Tensors that went through hooks are left out, since reading them would
    run the hooks (those of a checkpoint recompute).
    """
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
    """Return a number that tensors have in common if they share memory, or None if there is no memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or is_wrapped(tensor):
        return None
    storage: int = tensor.untyped_storage()._cdata
    return storage
