"""Ways to make and keep V's random parts: none of them changes V."""

from __future__ import annotations

import gc

import pytest
import torch
from support.oracle import gradients
from support.problems import draw, mlp
from support.rules import INEXACT
from torch import Tensor, nn

import feedbackhook
from feedbackhook import LayerInfo
from feedbackhook.rng import CounterRNG

LAYER = LayerInfo("fc", "Linear", (2, 3), 3)


def trained(mode: str, **options: object) -> tuple[nn.Module, list[Tensor]]:
    """A model after three steps, and every gradient and V on the way."""
    model, seen = mlp(), []
    patch = feedbackhook.patch(model, mode, **options)
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=0.1)
    for step in range(3):
        got = gradients(model, draw(3, 4, seed=step))
        seen += [got.input, *got.parameters.values(), *(patch.feedback(row.name) for row in patch.layers)]
        optimizer.step()
    return model, seen


@pytest.mark.parametrize("mode", INEXACT)
@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"fused": True}, {"recompute": True, "fused": True}]
)
def test_neither_recomputing_nor_fusing_changes_v(mode, options):
    needed = INEXACT[mode]
    kept, other = trained(mode, **needed)[1], trained(mode, **needed, **options)[1]
    assert len(kept) == len(other) > 0
    for a, b in zip(kept, other, strict=True):
        assert torch.equal(a, b)


def tensors_alive() -> list[Tensor]:
    """All that Python can reach."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]


def bytes_beside(model: nn.Module, before: list[Tensor]) -> int:
    """The bytes of tensors that are new since `before`, without those of the model."""
    old = {id(tensor) for tensor in before}
    new = [t.untyped_storage() for t in tensors_alive() if id(t) not in old]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum({s.data_ptr(): s.nbytes() for s in new if s.data_ptr() not in own}.values())


@pytest.mark.parametrize(
    ("mode", "options", "copies"),
    [
        ("uSF", {}, 0),
        ("brSF", {}, 0),
        ("frSF", {}, 1),
        ("RndF", {}, 1),
        ("FA", {}, 1),
        ("uSF-SN", {}, 0),
        ("uSF-init", {}, 1),
        ("frSF", {"recompute": True}, 0),
        ("angle", {"recompute": True}, 0),
        ("low_rank", {"recompute": True}, 0),
        ("RndF", {"recompute": True}, 0),
        ("sign", {"recompute": True, "concordance": 0.7}, 0),
    ],
)
def test_lasting_memory_in_copies_of_the_weights(mode, options, copies):
    """After an optimizer step: brSF keeps its parts from the first backward until then."""
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = tensors_alive()
    patch = feedbackhook.patch(model, mode, **options)
    model(torch.randn(5, 200, requires_grad=True)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weights = sum(row.shape[0] * row.shape[1] * 4 for row in patch.layers)
    draws = 8 * len(patch.layers)  # each layer counts its draws in an int64
    assert bytes_beside(model, before) == copies * weights + draws


SIZES = [0, 1, 2, 3, 255, 256, 257, 4099, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 3 << 18, 700_001]


@pytest.mark.parametrize("count", [0, 5, 1 << 33])
def test_the_fused_kernel_draws_the_same_bits(count):
    plain, fused = CounterRNG(3, LAYER, count), CounterRNG(3, LAYER, count, fused=True)
    for n in SIZES:
        weight = torch.empty(n)
        assert torch.equal(fused.uniform(weight, "sign"), plain.uniform(weight, "sign"))
        assert torch.equal(fused.uniform16(weight, "sign"), plain.uniform16(weight, "sign"))


def test_the_fused_kernel_is_compiled_once_for_all_sizes_and_keys():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for count, n in enumerate(SIZES):
        CounterRNG(count, LAYER, count, fused=True).uniform(torch.empty(n), str(n))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # empty, one number, any other size
