"""The recipe for low-rank adapters.

The weights after a few steps are those of a plain loop with the same patch on the same batches, whose
gradients are the oracle's and not backprop's.
"""

from __future__ import annotations

import copy
import functools
from types import ModuleType

import pytest
import torch
from support.bounds import ROUNDING
from support.oracle import TOLERANCE, UNLIKE
from support.problems import draw, redrawn
from support.trainers import (
    SIGN,
    assert_told,
    cross_entropy,
    distance,
    gradients_of,
    images,
    load_trainer,
    moved,
    plain_loop,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import feedbackhook

PARTS = ("base_layer", "lora_A.default", "lora_B.default")


@pytest.fixture(scope="module")
def lora() -> ModuleType:
    return load_trainer("lora")


def test_adapters_learn_as_the_oracle_says(lora):
    start = redrawn(lora.adapted(lora.tiny_vit(), rank=2))
    data, lr = images(12), 1e-2
    model = copy.deepcopy(start)
    patch = feedbackhook.patch(model, **SIGN)
    torch.manual_seed(1)
    lora.train(model, *data.tensors, epochs=1, batch_size=6, lr=lr)
    torch.manual_seed(1)
    batches = list(DataLoader(data, batch_size=6, shuffle=True))
    loop = functools.partial(plain_loop, batches=batches, loss_of=cross_entropy)
    adamw = functools.partial(torch.optim.AdamW, lr=lr)
    want, exact = (loop(copy.deepcopy(start), rule, optimizer=adamw) for rule in (SIGN, None))
    assert distance(moved(model, start), moved(want, start)) <= TOLERANCE
    assert distance(moved(model, start), moved(exact, start)) > 0.1
    still = {name for name, way in moved(model, start).items() if not way.any()}
    assert {name for name in still if "lora_" in name} == set()
    assert all("lora_" in name for name in set(moved(model, start)) - still)
    rerouted = {row.name: row.rerouted for row in patch.layers}
    for part in PARTS:
        assert rerouted[f"base_model.model.blocks.1.mlp.fc1.{part}"] == 2


def adapted_linear(lora: ModuleType) -> tuple[nn.Module, nn.Linear, Tensor, Tensor, float]:
    """An adapted model of one layer, its base layer, A and B, and s."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), config).double()
    layer = model.base_model.model[0]
    return model, layer.base_layer, layer.lora_A.default.weight, layer.lora_B.default.weight, 6 / 2


def test_what_v_is_for_a_layer_and_its_adapter(lora):
    model, base, _, b, s = adapted_linear(lora)
    with torch.no_grad():
        b.copy_(draw(5, 2))
    patch = feedbackhook.patch(model, **SIGN)
    x, delta = draw(3, 4, seed=1).requires_grad_(), draw(3, 5, seed=2)
    model(x).backward(delta)
    of_base, of_a, of_b = (patch.feedback(f"base_model.model.0.{part}") for part in PARTS)
    # Sums of two, four and five products: fewer than 16 roundings, of numbers that may cancel.
    size = delta.abs() @ (of_base.abs() + s * of_b.abs() @ of_a.abs())
    apart = (x.grad - delta @ (of_base + s * of_b @ of_a)).abs()
    assert (apart <= 2 * 16 * ROUNDING["float64"] * size).all()
    assert (x.grad - delta @ base.weight).norm() > 0.1


@pytest.mark.parametrize(("rule", "learns"), [(SIGN, False), ({"mode": "RndF"}, True)], ids=["sign", "RndF"])
def test_while_b_is_zero_a_learns_only_where_v_does_not_follow_its_signs(lora, rule, learns):
    model, _, a, b, _ = adapted_linear(lora)
    assert not b.any()
    feedbackhook.patch(model, **rule)
    model(draw(3, 4)).backward(draw(3, 5, seed=2))
    assert a.grad.any() == learns
    assert b.grad.any()


def test_patching_before_the_adapters_leaves_them_exact(lora):
    torch.manual_seed(3)
    plain = redrawn(lora.tiny_vit())
    gradients = {}
    for order in ("before", "after, without the adapters", "after"):
        model = copy.deepcopy(plain)
        if order == "before":
            feedbackhook.patch(model, "uSF")
        model = lora.adapted(model, rank=2).double()
        with torch.no_grad():
            for number, (name, value) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    value.copy_(draw(*value.shape, seed=number))
        if order == "after":
            feedbackhook.patch(model, "uSF")
        elif order != "before":
            feedbackhook.patch(model, "uSF", exclude=r".*lora_.*")
        cross_entropy(model, images(4)[:]).backward()
        gradients[order] = gradients_of(model)
    assert distance(gradients["before"], gradients["after, without the adapters"]) <= TOLERANCE
    assert distance(gradients["before"], gradients["after"]) > UNLIKE


def test_the_recipe_for_adapters_runs(lora, capsys):
    lora.main(SIGN, smoke=True)
    out = capsys.readouterr().out
    assert_told(out, [f"base_model.model.blocks.1.attn.qkv.{part}" for part in PARTS], rerouted=4)
    assert "base, by backprop: 2." in out
