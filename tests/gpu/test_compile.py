"""Compiled code on a GPU: Triton's kernels, and CUDA graphs that replay them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support import bounds
from support.gpu import (
    DEVICE,
    ON_GPU,
    RULES,
    assert_follows,
    assert_half_follows,
    cnn,
    feedback_of,
    home,
    moved,
)
from support.oracle import Step, assert_same_gradients, by_backprop, gradients
from support.problems import MLP_UPSTREAM, draw, mlp
from torch import Tensor, nn

import feedbackhook

COMPILED = {
    "mlp": (mlp, draw(3, 4), MLP_UPSTREAM),
    "cnn": (cnn, draw(2, 2, 9, 9), ["input", "0.weight", "2.weight"]),
}
MODES_OF_COMPILING = pytest.mark.parametrize("how", ["default", "reduce-overhead"])


def compiled_step(model: nn.Module, how: str) -> Step:
    """`fullgraph=True`: falling back to eager code would be an error."""
    compiled = torch.compile(model, mode=how, fullgraph=True)

    def step(_: nn.Module, x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return step


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
@pytest.mark.parametrize(
    ("mode", "network"),
    [
        *((mode, "mlp") for mode in RULES if mode not in ("symmetric", "tensor")),
        ("sign", "cnn"),
        ("brSF", "cnn"),
    ],
)
def test_compiled_steps_follow_v(mode, network, how):
    """Six steps, so CUDA graphs are warmed up, recorded and replayed; brSF redraws after each. The oracle's V
    comes from an eager twin, independent of the compiled code."""
    build, x, unlike = COMPILED[network]
    plain = build()
    (model, compiled_patch), (twin, patch) = (moved(plain, mode, **RULES[mode]) for _ in range(2))
    optimizers = [
        torch.optim.SGD([*net.parameters(), *of_net.parameters()], lr=0.01)
        for net, of_net in ((model, compiled_patch), (twin, patch))
    ]
    step = compiled_step(model, how)
    # Compiled and eager code have different inverse error functions in float32.
    tolerance = bounds.HALF_OF_FLOAT32 if mode == "random" else bounds.HALF_OF_FLOAT64
    torch._dynamo.utils.counters.clear()
    for _ in range(6):
        plain.load_state_dict(model.state_dict())
        twin.load_state_dict(model.state_dict())
        got = gradients(model, x.to(DEVICE), step)
        assert_follows(got, plain, feedback_of(patch), x, tolerance, unlike=unlike)
        eager = gradients(twin, x.to(DEVICE))
        assert_same_gradients(home(got), home(eager), tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()  # a CUDA graph overwrites the gradients that it has made before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@ON_GPU
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mode", ["uSF", "frSF", "brSF"])
def test_a_patch_keeps_no_graph_from_being_a_cuda_graph(mode):
    model, _ = moved(mlp(), mode)
    step = compiled_step(model, "reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        gradients(model, draw(3, 4).to(DEVICE), step)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
def test_a_model_is_patched_then_moved_then_compiled(how):
    """Nothing has run on the GPU when the code is made."""
    plain, x = mlp(), draw(3, 4)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "brSF")
    model.to(DEVICE)
    step = compiled_step(model, how)
    for _ in range(4):
        got = gradients(model, x.to(DEVICE), step)
        assert_follows(got, plain, feedback_of(patch), x, unlike=MLP_UPSTREAM)
        patch.redraw()


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
@pytest.mark.parametrize("mode", ["frSF", "brSF"])
def test_set_redraw_and_removal_reach_compiled_code(mode, how):
    plain, x = mlp(), draw(3, 4)
    (model, compiled_patch), (_, patch) = (moved(plain, mode) for _ in range(2))
    step = compiled_step(model, how)
    seen = []
    for concordance in (1.0, 0.75, 0.5):
        for one in (compiled_patch, patch):
            one.set(concordance=concordance)
        for _ in range(3):
            got = gradients(model, x.to(DEVICE), step)
            assert_follows(got, plain, feedback_of(patch), x, unlike=MLP_UPSTREAM)
            seen.append(got.parameters["0.weight"])
            for one in (compiled_patch, patch):
                one.redraw()
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    compiled_patch.remove()
    exact = home(gradients(model, x.to(DEVICE), step))
    assert_same_gradients(exact, by_backprop(plain, x), bounds.HALF_OF_FLOAT64)


@pytest.mark.usefixtures("_fresh_compiler")
@MODES_OF_COMPILING
@pytest.mark.parametrize("mode", ["frSF", "brSF"])
def test_compiled_under_autocast(mode, how):
    """The usual setting on a GPU: convolutions in channels_last and bfloat16, compiled."""
    plain, x = cnn(), draw(8, 2, 9, 9)
    model, patch = moved(plain.float().to(memory_format=torch.channels_last), mode)
    plain.double()
    step = compiled_step(model, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = x.float().to(DEVICE, memory_format=torch.channels_last)

    def mixed(_: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return step(model, batch).float()

    for _ in range(4):
        plain.load_state_dict(model.state_dict())
        feedback = feedback_of(patch)
        assert_half_follows(gradients(model, batch, mixed), plain, feedback, x, "bfloat16")
        optimizer.step()
