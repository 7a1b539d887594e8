"""Each of PyTorch's private names that the library uses does what it is used for.

A release of PyTorch that changes one fails here, by the name of the function that relies on it.
"""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.problems import draw
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from feedbackhook.core import torch_internals

# --- the backward that is running ------------------------------------------------------------------------


def in_backward(look) -> tuple[Tensor, list]:
    """A leaf that requires a gradient, and what `look()` says while a backward reaches it."""
    leaf, seen = torch.ones(3, requires_grad=True), []
    leaf.register_hook(lambda gradient: seen.append(look()))
    return leaf, seen


def test_current_backward_is_one_number_in_a_backward_and_another_in_the_next():
    assert torch_internals.current_backward() == -1
    leaf, seen = in_backward(torch_internals.current_backward)
    for _ in range(2):
        doubled = leaf * 2
        doubled.register_hook(lambda gradient: seen.append(torch_internals.current_backward()))
        doubled.sum().backward()
    assert seen[0] == seen[1] != -1
    assert seen[2] == seen[3] != -1
    assert seen[0] != seen[2]
    assert torch_internals.current_backward() == -1


def test_current_backward_of_a_backward_in_a_backward():
    inner, of_inner = in_backward(torch_internals.current_backward)

    def look() -> int:
        with torch.enable_grad():
            inner.sum().backward()
        return torch_internals.current_backward()

    outer, of_outer = in_backward(look)
    outer.sum().backward()
    assert of_inner[0] != of_outer[0]
    assert -1 not in (*of_inner, *of_outer)


def by_backward(output: Tensor, leaf: Tensor) -> None:
    output.backward()


def by_autograd_backward(output: Tensor, leaf: Tensor) -> None:
    torch.autograd.backward([output])


def by_autograd_grad(output: Tensor, leaf: Tensor) -> None:
    torch.autograd.grad(output, leaf)


def by_gradient_edge(output: Tensor, leaf: Tensor) -> None:
    edge = torch.autograd.graph.get_gradient_edge(output)
    torch.autograd.backward([edge], [torch.ones_like(output)])


@pytest.mark.parametrize("run", [by_backward, by_autograd_backward, by_autograd_grad, by_gradient_edge])
def test_backward_roots_are_the_nodes_where_the_backward_began(run):
    leaf, seen = in_backward(torch_internals.backward_roots)
    output = (leaf * 2).sum()
    run(output, leaf)
    assert seen == [[output.grad_fn]]


def test_backward_roots_of_several_outputs():
    leaf, seen = in_backward(torch_internals.backward_roots)
    outputs = [leaf.sum(), (3 * leaf).sum()]
    torch.autograd.backward(outputs)
    assert seen == [[output.grad_fn for output in outputs]]


def test_backward_roots_are_found_from_a_thread_of_its_own():
    """As on a GPU, where hooks run below no Python call of a backward."""
    with ThreadPoolExecutor(1) as pool:
        leaf, seen = in_backward(lambda: pool.submit(torch_internals.backward_roots).result())
        output = leaf.sum()
        output.backward()
    assert seen == [[output.grad_fn]]


def test_no_backward_has_no_roots():
    assert torch_internals.backward_roots() is None


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_wrap_checkpoint_wraps_once_what_is_recomputed(reentrant):
    said: list[str] = []

    def wrap(function):
        said.append("wrapped")

        def recompute(*args):
            said.append("recomputed")
            return function(*args)

        recompute.__wrapped__ = function
        return recompute

    def part(x: Tensor) -> Tensor:
        torch_internals.wrap_checkpoint(wrap)
        torch_internals.wrap_checkpoint(wrap)
        return torch.tanh(x * 2)

    x = draw(3).requires_grad_()
    output = checkpoint(part, x, use_reentrant=reentrant)
    assert said == ["wrapped"]
    output.sum().backward()
    assert said.count("recomputed") == 1
    torch.testing.assert_close(x.grad, 2 * (1 - torch.tanh(2 * x.detach()) ** 2))


@pytest.mark.parametrize("enabled", [True, False], ids=["with gradients", "under no_grad"])
@pytest.mark.parametrize("hooks", [False, True], ids=["alone", "under other hooks"])
def test_wrap_checkpoint_without_a_checkpoint_does_nothing(enabled, hooks):
    wrapped: list[object] = []
    with torch.set_grad_enabled(enabled):
        if hooks:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                torch_internals.wrap_checkpoint(wrapped.append)
        else:
            torch_internals.wrap_checkpoint(wrapped.append)
    assert wrapped == []


# --- transforms and tracing ------------------------------------------------------------------------------

TRANSFORMS = {
    "vmap": lambda f: torch.func.vmap(f)(torch.ones(2, 3)),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(3)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformed_and_is_wrapped_know_torch_func(transform):
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_internals.transformed(), torch_internals.is_wrapped(x)))
        return x * 2

    transform(look)
    assert seen == [(True, True)]
    look(torch.ones(3))
    assert seen[1:] == [(False, False)]


def test_transformed_knows_forward_mode():
    assert not torch_internals.transformed()
    with forward_ad.dual_level():
        assert torch_internals.transformed()
    assert not torch_internals.transformed()


@pytest.mark.parametrize("required", [False, True], ids=["data", "requires a gradient"])
def test_levels_and_requires_grad_look_through_every_wrapper(required):
    x, seen = torch.ones(2, 2, 3, requires_grad=required), []

    def look(part: Tensor) -> Tensor:
        *_, inside = torch_internals.levels(part)
        seen.append((inside.shape, inside.requires_grad, torch_internals.requires_grad(part)))
        return part * 2

    torch.func.vmap(torch.func.vmap(look))(x)
    assert seen == [(x.shape, required, required)]
    assert list(torch_internals.levels(x)) == [x]
    assert torch_internals.requires_grad(x) is required


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_is_exporting_inside_torch_jit_trace_and_torch_export_alone():
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_internals.is_exporting())
        return x * 2

    look(torch.ones(3))
    assert seen == [False]
    torch.jit.trace(look, torch.ones(3), check_trace=False)
    assert seen == [False, True]
    layer = nn.Identity()
    layer.forward = look  # type: ignore[method-assign]
    torch.export.export(layer, (torch.ones(3),), strict=False)
    assert seen == [False, True, True]


def test_is_exporting_is_false_in_what_torch_compile_compiles():
    @torch.compile(backend="eager", fullgraph=True)
    def look(x: Tensor) -> Tensor:
        return x + 1 if torch_internals.is_exporting() else x

    assert torch.equal(look(torch.ones(3)), torch.ones(3))


def test_forget_compiled_code_lets_the_compiler_see_hooks():
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = True
    assert torch_internals.forget_compiled_code()
    assert not torch._dynamo.config.skip_nnmodule_hook_guards
    assert not torch_internals.forget_compiled_code()  # it looked at hooks before
    layer = nn.Linear(3, 3)
    compiled = torch.compile(layer, backend="eager")
    x = torch.ones(1, 3)
    torch.testing.assert_close(compiled(x), layer(x))
    with layer.register_forward_hook(lambda module, args, output: output + 1):
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias) + 1)
    torch.compiler.reset()


def test_run_while_compiling_runs_once_and_is_not_in_the_graph():
    class Thing:
        runs, factor = 0, torch.ones(())

        @torch_internals.run_while_compiling
        def set_factor_of_thing(self, value: float) -> bool:
            self.runs += 1
            self.factor = torch.tensor(value)
            return True

    thing = Thing()

    @torch.compile(backend="eager", fullgraph=True)
    def double(x: Tensor) -> Tensor:
        thing.set_factor_of_thing(2.0)
        return x * thing.factor

    for value in (2, 5):
        torch.testing.assert_close(double(torch.ones(3)), torch.full((3,), float(value)))
        thing.factor.fill_(5)  # which the graph reads
    assert thing.runs == 1
    torch.compiler.reset()


def test_compile_in_place_makes_one_graph_of_a_module_and_its_hooks():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(1, 3)
    want, names = model(x) * 2, list(model.state_dict())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch_internals.compile_in_place(model, backend=backend, fullgraph=True)
    assert not graphs
    for _ in range(2):
        torch.testing.assert_close(model(x), want)
    assert len(graphs) == 1
    assert list(model.state_dict()) == names
    torch.testing.assert_close(copy.deepcopy(model)(x), want)  # a copy runs uncompiled
    torch.compiler.reset()


# --- modules and tensors ----------------------------------------------------------------------------------


def test_own_parameter_and_own_child_are_those_that_a_module_registers_itself():
    model = nn.Sequential(nn.Linear(3, 3))
    assert torch_internals.own_parameter(model[0], "weight") is model[0].weight
    assert torch_internals.own_parameter(model, "0.weight") is None
    assert torch_internals.own_child(model, "0") is model[0]
    assert torch_internals.own_child(model, "1") is None
    nn.utils.parametrizations.weight_norm(model[0])
    assert torch_internals.own_parameter(model[0], "weight") is None  # derived from two others now
    assert torch_internals.own_child(model[0], "parametrizations") is not None


def test_is_replica_knows_what_data_parallel_makes():
    model = nn.Linear(3, 3)
    replica = model._replicate_for_data_parallel()
    assert torch_internals.is_replica(replica)
    assert not torch_internals.is_replica(model)


def test_base_of_is_what_a_view_is_a_view_of():
    w = nn.Parameter(torch.ones(4, 4))
    assert torch_internals.base_of(w) is None
    assert torch_internals.base_of(w.t()) is w
    assert torch_internals.base_of(w[1:].view(-1)) is w
    assert torch_internals.base_of(w.clone()) is None


def test_version_of_grows_with_changes_in_place_alone():
    x = torch.ones(3)
    before = torch_internals.version_of(x)
    _ = x + 1
    assert torch_internals.version_of(x) == before
    x.add_(1)
    assert torch_internals.version_of(x) > before


def test_foreach_functions_work_on_each_tensor_of_a_list():
    def tensors() -> list[Tensor]:
        return [torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0, -4.0])]

    def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    found = tensors()
    torch_internals.foreach_mul_(found, 3)
    assert_equal(found, [3 * x for x in tensors()])
    torch_internals.foreach_sub_(found, tensors())
    assert_equal(found, [2 * x for x in tensors()])
    torch_internals.foreach_add_(found, tensors(), alpha=-1)
    assert_equal(found, tensors())
    assert_equal(list(torch_internals.foreach_sign(found)), [x.sign() for x in tensors()])
    assert_equal(found, tensors())
    torch_internals.foreach_sign_(found)
    assert_equal(found, [x.sign() for x in tensors()])


# --- DistributedDataParallel ------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False], ids=["static graph", "dynamic graph"])
def test_awaits_first_backward_before_the_first_backward_of_a_static_graph(tmp_path, static):
    def awaits() -> bool:
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [earlier for earlier, _ in node.next_functions]
        return any(torch_internals.awaits_first_backward(node) for node in seen)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3), static_graph=static)
        for first in (True, False):
            loss = model(torch.ones(2, 3)).sum()
            assert awaits() is (static and first)
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()


# --- function modes --------------------------------------------------------------------------------------


class Mode(TorchFunctionMode):
    """Counts calls."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_stack_of_modes():
    assert torch_internals.function_modes() == []
    assert torch_internals.top_function_mode() is None
    outer, inner = Mode(), Mode()
    with outer, inner:
        assert torch_internals.function_modes() == [outer, inner]
        assert torch_internals.top_function_mode() is inner
        of_another_thread: list[object] = []
        thread = threading.Thread(
            target=lambda: of_another_thread.append(torch_internals.top_function_mode())
        )
        thread.start()
        thread.join()
        assert of_another_thread == [None]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_take_off_leaves_the_other_modes_in_their_order(place):
    modes = [Mode(), Mode(), Mode()]
    for mode in modes:
        mode.__enter__()
    torch_internals.take_off(modes[place])
    left = [mode for mode in modes if mode is not modes[place]]
    assert torch_internals.function_modes() == left
    for mode in reversed(left):
        torch_internals.take_off(mode)
    assert torch_internals.function_modes() == []


def test_caller_and_is_running_tell_which_calls_led_here():
    def caller_of_mine():
        return torch_internals.caller(1)

    frame = caller_of_mine()
    assert frame is sys._getframe()
    assert torch_internals.is_running(frame, sys._getframe())

    def ended():
        return sys._getframe()

    assert not torch_internals.is_running(ended(), sys._getframe())
    assert torch_internals.is_running(None, sys._getframe())


def test_stacklevel_outside_is_that_of_the_first_frame_outside():
    inside: dict[str, object] = {"__name__": "inside.a", "look": torch_internals.stacklevel_outside}
    exec("def warn(): return look('inside.')\ndef call(): return warn()", inside)
    assert inside["warn"]() == 2
    assert inside["call"]() == 3
    assert torch_internals.stacklevel_outside("inside.") == 1


def test_attention_shows_a_mode_its_projections():
    """As the original does not: to a mode, that is one call."""
    attention, x = nn.MultiheadAttention(4, 2).double(), draw(3, 1, 4)
    arguments = (x, x, x, 4, 2, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0)
    rest = (attention.out_proj.weight, attention.out_proj.bias)

    class Seen(Mode):
        def __init__(self) -> None:
            super().__init__()
            self.functions: list[object] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.functions.append(func)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        whole = F.multi_head_attention_forward(*arguments, *rest)[0]
    assert seen.functions == [F.multi_head_attention_forward]
    with Seen() as seen:
        shown = torch_internals.multi_head_attention(*arguments, *rest)[0]
    assert F.multi_head_attention_forward not in seen.functions
    assert seen.functions.count(F.linear) == 2
    assert torch.equal(shown, whole)


# --- the graph -------------------------------------------------------------------------------------------


def test_nodes_that_are_made_later_have_larger_sequence_numbers():
    leaf = torch.ones(3, requires_grad=True)
    before = (leaf * 2).grad_fn
    boundary = torch_internals.next_sequence_number()
    after = (leaf * 2).grad_fn
    accumulating = after.next_functions[0][0]
    numbers = [torch_internals.sequence_number(node) for node in (before, after, accumulating)]
    assert numbers[0] < boundary <= numbers[1] < numbers[2]


class Keeps(torch.autograd.Function):
    """Saves both of its inputs."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, grad * x


SAVING = {
    "mul": lambda x, w: x * w,
    "mm": torch.mm,
    "linear": lambda x, w: F.linear(x, w),
    "index": lambda x, w: x.index_put((torch.tensor([0]),), w[:1]) * w,
    "a function of one's own": Keeps.apply,
}


@pytest.mark.parametrize("operation", SAVING.values(), ids=SAVING)
def test_saved_tensors_are_those_that_a_node_keeps_until_it_is_used_up(operation):
    x, w = draw(3, 3).requires_grad_(), draw(3, 3)
    output = operation(x, w)
    kept = {torch_internals.storage_of(saved) for saved in torch_internals.saved_tensors(output.grad_fn)}
    assert torch_internals.storage_of(w) in kept
    output.sum().backward()
    assert list(torch_internals.saved_tensors(output.grad_fn)) == []


def test_saved_tensors_in_a_list():
    x, indices = draw(3, 3).requires_grad_(), torch.tensor([0, 2])
    kept = list(torch_internals.saved_tensors(x[indices].grad_fn))
    assert [torch_internals.storage_of(saved) for saved in kept] == [torch_internals.storage_of(indices)]


def test_saved_tensors_leaves_out_what_hooks_have_packed_and_does_not_run_them():
    unpacked: list[object] = []
    x, w = draw(3, 3).requires_grad_(), draw(3, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        output = x * w
    assert list(torch_internals.saved_tensors(output.grad_fn)) == []
    assert unpacked == []
    output.sum().backward()
    assert len(unpacked) == 1


def test_saved_tensors_of_nodes_that_keep_none():
    leaf = torch.ones(3, requires_grad=True)
    node = (leaf + 1).grad_fn
    assert list(torch_internals.saved_tensors(node)) == []
    assert list(torch_internals.saved_tensors(node.next_functions[0][0])) == []


def test_storage_of_is_the_same_for_what_shares_memory_and_for_nothing_else():
    w = nn.Parameter(torch.ones(4, 4))
    storage = torch_internals.storage_of(w)
    assert storage is not None
    for alias in (w.data, w.detach(), w.t(), w[1:], w.view(16), w.detach()[:, 2]):
        assert torch_internals.storage_of(alias) == storage
    assert torch_internals.storage_of(w.clone()) != storage
    assert torch_internals.storage_of(torch.ones(4, 4)) != storage


def test_storage_of_what_has_no_memory_of_its_own_is_none():
    seen: list[int | None] = []
    torch.func.vmap(lambda x: seen.append(torch_internals.storage_of(x)) or x)(torch.ones(2, 3))
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    assert seen == [None]
    assert torch_internals.storage_of(jagged) is None
    assert torch_internals.storage_of(torch.eye(3).to_sparse()) is None
