"""Ways to make and keep V's random parts: none of them changes V."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from support.oracle import gradients
from support.problems import draw, mlp
from support.rules import INEXACT
from torch import Tensor, nn

import feedbackhook
from feedbackhook import LayerInfo, rng
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


@pytest.mark.parametrize("at_once", [1 << 26, 1 << 18])
@pytest.mark.parametrize("fused", [False, True])
def test_layers_drawn_together_have_the_numbers_that_each_has_alone(monkeypatch, fused, at_once):
    monkeypatch.setattr(rng, "_AT_ONCE", at_once)
    layers = [(LayerInfo(f"layers.{n}", "Linear", (n, 1), n), torch.empty(n)) for n in SIZES]
    numbers = [CounterRNG(3, layer, 0, fused) for layer, _ in layers]
    together = rng.Together()
    for count in range(3):
        wanted = []
        for now, (layer, weight) in zip(numbers, layers, strict=True):
            alone = CounterRNG(3, layer, count)
            wanted.append(
                (alone.uniform(weight, "sign"), alone.uniform16(weight), alone.uniform16(weight, "sign"))
            )
            if at_once > max(SIZES) * 3 * len(SIZES):
                assert len(now.streams.ready) == (3 if count else 0)
        for now, (_, weight), want in zip(numbers, layers, wanted, strict=True):
            got = now.uniform(weight, "sign"), now.uniform16(weight), now.uniform16(weight, "sign")
            assert all(map(torch.equal, got, want))
            assert not now.streams.ready
        numbers = [dataclasses.replace(now, count=count + 1) for now in numbers]
        together.draw(numbers, torch.device("cpu"))


def test_layers_that_a_step_redraws_are_drawn_together_by_the_fused_kernel(monkeypatch):
    """And each alone by the blocks that stay in a CPU's cache."""
    drawn, draw_all = [], rng.Together.draw
    monkeypatch.setattr(
        rng.Together,
        "draw",
        lambda self, rngs, device: draw_all(self, drawn.append(rngs) or rngs, device),
    )
    for fused in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        feedbackhook.patch(model, "brSF", fused=fused, concordance=0.75)
        for step in range(3):
            model(draw(3, 4)).sum().backward()
            assert [len(rngs) for rngs in drawn] == fused * step * [len(list(model.children())[::2])]
            optimizer.step()


def test_no_numbers_are_drawn_in_advance_that_the_rule_does_not_ask_for():
    """The first layer needs no V, since the input requires no gradient."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patch = feedbackhook.patch(model, "brSF", fused=True)
    first, *others = [layer.feedback._streams for layer in patch.state.layers]
    for concordance, asked in ((0.75, 2), (1.0, 1)):
        patch.set(concordance=concordance)
        for step in range(3):
            model(draw(3, 4)).sum().backward()
            assert {len(each.asked) for each in others} == {asked}
            assert not any(each.ready for each in others)
            assert len(first.ready) == (asked if step == 1 else 0)
            optimizer.step()
        assert not first.asked


def test_the_fused_kernel_is_compiled_once_for_all_sizes_and_keys():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for count, n in enumerate(SIZES):
        CounterRNG(count, LAYER, count, fused=True).uniform(torch.empty(n), str(n))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
