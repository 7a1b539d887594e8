"""V on a GPU is the CPU's V, and takes no more memory than it must."""

from __future__ import annotations

import copy
import gc
import math
import time

import pytest
import torch
from support import bounds
from support.gpu import DEVICE, ON_GPU, RULES, feedback_of, moved
from support.oracle import gradients
from support.problems import Net, draw, mlp, redrawn
from torch import Tensor, nn

import feedbackhook
from feedbackhook import CounterRNG, LayerInfo
from feedbackhook.rng import Streams, Together

BY_HASH_ALONE = ["uSF", "NuSF", "frSF", "brSF", "FA", "sign-symmetry"]
"""Rules whose V has only the hash's uniform numbers, products and signs, but no sum and no inverse error
function."""
WITH_SUMS = ["sign", "uSF-SN", "sparse", "quantized", "svd"]
"""Rules with a sum, but no inverse error function."""
NORMAL = [mode for mode in RULES if mode not in ("symmetric", "tensor", *BY_HASH_ALONE, *WITH_SUMS)]


LAYER = LayerInfo("block.fc", "Linear", (700, 1000), 1000)
SIZES = [0, 1, 257, 4099, (1 << 18) + 1, 700_001]


@pytest.mark.parametrize("count", [0, 5, 2**32 - 1, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["by tensor operations", "fused"])
def test_uniform_draws_are_those_of_the_cpu_in_every_bit(count, fused):
    for n in SIZES:
        plain = CounterRNG(3, LAYER, count)
        here = count.to(DEVICE) if isinstance(count, Tensor) and not fused else count
        rng = CounterRNG(3, LAYER, here, fused=fused)
        there, at_cpu = torch.empty(n, device=DEVICE), torch.empty(n)
        assert torch.equal(rng.uniform(there, "sign").cpu(), plain.uniform(at_cpu, "sign")), n
        assert torch.equal(rng.uniform16(there, "sign").cpu(), plain.uniform16(at_cpu, "sign")), n


@pytest.mark.parametrize("fused", [False, True], ids=["by tensor operations", "fused"])
def test_layers_drawn_together_have_the_numbers_of_the_cpu_in_every_bit(fused):
    layers = [LayerInfo(f"layers.{n}", "Linear", (n, 1), n) for n in SIZES]
    together, streams = Together(), [Streams() for _ in layers]
    for count in (0, 5, 2**32 - 1):
        here = [CounterRNG(3, each, count, fused, of) for each, of in zip(layers, streams, strict=True)]
        together.draw(here, torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
        for n, layer, rng, of in zip(SIZES, layers, here, streams, strict=True):
            there, alone = torch.empty(n, device=DEVICE), CounterRNG(3, layer, count)
            assert len(of.ready) == (2 if count else 0)
            assert torch.equal(rng.uniform(there).cpu(), alone.uniform(torch.empty(n))), n
            assert torch.equal(rng.uniform16(there, "sign").cpu(), alone.uniform16(torch.empty(n), "sign")), n
            assert not of.ready


@pytest.mark.parametrize("fused", [False, True], ids=["by tensor operations", "fused"])
def test_redrawn_parts_are_those_of_the_cpu_in_every_bit(fused):
    plain, drawn = mlp(), []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(plain).to(device)
        patch = feedbackhook.patch(model, "brSF", concordance=0.75, fused=fused)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = []
        for _ in range(3):
            model(draw(3, 4).to(device)).sum().backward()
            parts += [layer.feedback.parts(layer.weight())["M o S"].cpu() for layer in patch.state.layers]
            optimizer.step()
        drawn.append(parts)
    assert len(drawn[0]) == 3 * len(patch.layers)
    assert all(map(torch.equal, *drawn))


def test_normal_draws_are_those_of_the_cpu_but_for_the_inverse_error_functions_rounding():
    """Each device has its own inverse error function in float32, so erf of their draws is compared. It agrees
    to a few units in the last place: roundings of the function, of the root of 2, and of what is between."""
    wanted = 2 * CounterRNG(3, LAYER).uniform(torch.empty(LAYER.shape)).double() - 1
    for device in ("cpu", DEVICE):
        draws = CounterRNG(3, LAYER).normal(torch.empty(LAYER.shape, device=device))
        assert draws.isfinite().all()
        reached = torch.special.erf(draws.cpu().double() / math.sqrt(2))
        assert (reached - wanted).abs().max() <= 8 * bounds.ROUNDING["float32"], device


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", BY_HASH_ALONE)
@pytest.mark.parametrize("moving", ["patched there", "moved when patched"])
def test_v_is_that_of_the_cpu_in_every_bit(mode, dtype, moving):
    plain = redrawn(Net()).to(dtype)
    on_cpu = feedbackhook.patch(copy.deepcopy(plain), mode, **RULES[mode], seed=5)
    model = copy.deepcopy(plain)
    if moving == "patched there":
        model.to(DEVICE)
    patch = feedbackhook.patch(model, mode, **RULES[mode], seed=5)
    model.to(DEVICE)
    for _ in range(2):
        for row in on_cpu.layers:
            v = patch.feedback(row.name)
            assert v.device.type == DEVICE
            assert v.dtype == dtype
            assert torch.equal(v.cpu(), on_cpu.feedback(row.name)), row.name
        patch.redraw()
        on_cpu.redraw()


@pytest.mark.parametrize("mode", [*WITH_SUMS, *NORMAL])
def test_v_with_a_sum_or_a_normal_draw_in_it_is_that_of_the_cpu_to_rounding(mode):
    """The GPU sums the norm of W in a different order; of the normal draws, the few largest differ most."""
    plain = redrawn(Net())
    _, patch = moved(plain, mode, **RULES[mode])
    on_cpu = feedbackhook.patch(plain, mode, **RULES[mode])
    tolerance = bounds.HALF_OF_FLOAT64 if mode in WITH_SUMS else bounds.HALF_OF_FLOAT32
    for name, v in feedback_of(patch).items():
        assert (v - on_cpu.feedback(name)).norm() <= tolerance * v.norm(), name


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"fused": True}, {"recompute": True, "fused": True}]
)
@pytest.mark.parametrize("mode", ["sign", "brSF", "RndF"])
def test_neither_recomputing_nor_fusing_changes_v(mode, options):
    seen = []
    for given_options in ({}, options):
        model, patch = moved(redrawn(Net()), mode, **given_options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(2):
            gradients(model, draw(2, 2, 9, 9, seed=step).to(DEVICE))
            seen.append(feedback_of(patch))
            optimizer.step()
    for kept, other in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(kept[name], other[name]) for name in kept)


def test_a_state_saved_on_one_device_is_that_of_the_other():
    model, patch = moved(mlp(), "brSF", seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients(model, draw(3, 4).to(DEVICE))
    optimizer.step()
    other = feedbackhook.patch(mlp(), "brSF", seed=4)
    other.load_state_dict(patch.state_dict())
    for name, v in feedback_of(patch).items():
        assert torch.equal(v, other.feedback(name))


def settled_memory() -> int:
    """Return the bytes allocated on the GPU once the backward's thread has freed its tensors.

    That thread frees its last tensors when it next gets the interpreter, which may be after `backward` has
    returned. It starts a second backward only after that, and what this one leaves behind is tiny.
    """
    until, seen = time.monotonic() + bounds.HANG, -1
    while True:
        (torch.zeros((), device=DEVICE, requires_grad=True) * 1).backward()
        gc.collect()
        torch.cuda.synchronize()
        now = torch.cuda.memory_allocated()
        if now == seen:
            return now
        assert time.monotonic() < until, "the GPU's memory does not settle"
        seen = now


@ON_GPU
@pytest.mark.parametrize(
    ("mode", "options", "copies"),
    [("uSF", {}, 0), ("brSF", {}, 0), ("frSF", {}, 1), ("RndF", {}, 1), ("frSF", {"recompute": True}, 0)],
)
def test_lasting_memory_in_copies_of_the_weights(mode, options, copies):
    model = nn.Sequential(nn.Linear(2048, 1024), nn.Tanh(), nn.Linear(1024, 2048)).to(DEVICE)
    x = torch.randn(5, 2048, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> int:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
        return settled_memory()

    step()  # after which the libraries have allocated their own memory
    before = step()
    patch = feedbackhook.patch(model, mode, **options)
    step()
    weights = sum(patch.weight(row.name).nbytes for row in patch.layers)
    assert (step() - before) / weights == pytest.approx(copies, abs=0.02)
