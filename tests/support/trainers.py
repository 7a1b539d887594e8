"""A plain training loop with the same patch, to compare the trainers' recipes with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import feedbackhook
from support.oracle import FLOOR, TOLERANCE, UNLIKE, swapped_saved_tensors
from support.problems import draw
from support.recipes import load_recipe

EXTRA = "pip install 'feedbackhook[trainers]'"
SIGN: dict[str, Any] = {"mode": "sign", "concordance": 0.75}
BRSF: dict[str, Any] = {"mode": "brSF", "concordance": 0.75}
RULES = {"sign": SIGN, "brSF": BRSF}
Tensors = dict[str, Tensor]

NEEDS = {
    "lightning_trainer": ["lightning"],
    "hf_trainer": ["transformers", "accelerate"],
    "lora": ["peft"],
    "distributed": [],
    "timm_script": [],
}


def skip_without(name: str) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"needs {package}: {EXTRA}")


def load_trainer(name: str) -> ModuleType:
    """A recipe as a module; the test is skipped without its packages."""
    skip_without(name)
    return load_recipe(f"retrofit/trainers/{name}")


def weights_of(model: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradients_of(model: nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: Tensors, b: Tensors) -> float:
    """The largest relative distance between tensors of one name."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    largest = max(x.double().norm().item() for x in b.values())
    differences = {
        name: (a[name].double() - b[name].double()).norm().item()
        / max(b[name].double().norm().item(), FLOOR * largest)
        for name in b
    }
    return max(differences.values())


def unpatched(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    if feedbackhook.get_patch(twin) is not None:
        feedbackhook.unpatch(twin)
    return twin


Loss = Callable[[nn.Module, Any], Tensor]


def oracle_gradients(model: nn.Module, patch: feedbackhook.Patch, loss_of: Loss, batch: Any) -> Tensors:
    """The gradients of the saved-tensor swap, on an unpatched copy, with the current V.

    Each layer whose input requires a gradient must be found.
    """
    twin = unpatched(model)
    feedback = {row.name: patch.feedback(row.name) for row in patch.layers if row.input_requires_grad}
    assert feedback, "no layer's input requires a gradient"
    twin.zero_grad()
    with swapped_saved_tensors(twin, feedback) as swaps:
        loss_of(twin, batch).backward()
    assert set(swaps) == set(feedback), f"never saved: {sorted(set(feedback) - set(swaps))}"
    return gradients_of(twin)


def backprop_gradients(model: nn.Module, loss_of: Loss, batch: Any) -> Tensors:
    twin = unpatched(model)
    twin.zero_grad()
    loss_of(twin, batch).backward()
    return gradients_of(twin)


def plain_loop(
    model: nn.Module,
    feedback: dict[str, Any] | None,
    batches: Iterable[Any],
    loss_of: Loss,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    tolerance: float | None = TOLERANCE,
) -> Tensors:
    """The weights after a step on each batch in a plain loop; without `feedback`, by backprop.

    Asserts that every gradient is the oracle's to within `tolerance` and not backprop's. None skips this, for
    a model that another test compares.
    """
    patch = None if feedback is None else feedbackhook.patch(model, **feedback)
    stepper = optimizer([p for p in model.parameters() if p.requires_grad])
    for batch in batches:
        stepper.zero_grad()
        loss_of(model, batch).backward()
        if patch is not None and tolerance is not None:
            got = gradients_of(model)
            assert distance(got, oracle_gradients(model, patch, loss_of, batch)) <= tolerance
            assert distance(got, backprop_gradients(model, loss_of, batch)) > UNLIKE
        stepper.step()
    return weights_of(model)


def sgd(parameters: list[nn.Parameter], lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def images(count: int, seed: int = 0) -> TensorDataset:
    """Noise in the shape of the digits, in float64, and labels."""
    return TensorDataset(draw(count, 1, 8, 8, seed=seed), torch.arange(count) % 10)


def cross_entropy(model: nn.Module, batch: Iterable[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def moved(end: nn.Module | Tensors, start: nn.Module) -> Tensors:
    """How far each weight has moved."""
    ends = weights_of(end) if isinstance(end, nn.Module) else end
    return {name: ends[name] - p.detach() for name, p in start.named_parameters()}


def assert_told(out: str, layers: Iterable[str], rerouted: int) -> None:
    """The output has the layers, their calls and rerouted error signals, their angle, and the loss."""
    rows = {line.split()[0]: line.split()[2:] for line in out.splitlines() if len(line.split()) > 4}
    for name in layers:
        calls, *through, angle = rows[name]
        assert calls == str(rerouted)
        assert through in ([calls], ["input", "needs", "no", "grad"])
        assert 1 < float(angle) < 120
    assert "training loss: " in out
