"""Compare a model on a GPU with the oracle, which runs on the CPU in float64.

`FEEDBACKHOOK_TEST_DEVICE=cpu` runs these tests on the CPU, to try them without a GPU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import feedbackhook
from feedbackhook import Patch
from support import bounds
from support.oracle import (
    Gradients,
    Step,
    assert_matches_oracle,
    assert_same_gradients,
    by_backprop,
    by_saved_tensors,
    distances,
)
from support.problems import draw, layer_names, redrawn
from support.rules import EVERY_RULE, PATCH_ALL

DEVICE = os.environ.get("FEEDBACKHOOK_TEST_DEVICE", "cuda")
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="is about a GPU only")

OPTIONS = {
    "tensor": {},
    "sign": {"concordance": 0.7},
    "random": {"redraw": "update"},
    "frSF": {"concordance": 0.5},
    "brSF": {"concordance": 0.75},
}
RULES = {mode: {**PATCH_ALL, **options} for mode, options in (EVERY_RULE | OPTIONS).items()}
"""Every built-in rule whose V is a function of W, with the options to test it with."""


def moved(plain: nn.Module, mode: str = "tensor", **options) -> tuple[nn.Module, Patch]:
    """Return a copy of `plain` on the device, patched there, and its patch.

    The rule "tensor" gets random V if none is given.
    """
    model = copy.deepcopy(plain).to(DEVICE)
    if mode == "tensor" and "feedback" not in options:
        with feedbackhook.patch(copy.deepcopy(plain), "symmetric") as patch:
            shapes = {row.name: row.shape for row in patch.layers}
        options["feedback"] = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return model, feedbackhook.patch(model, mode, **options)


def feedback_of(patch: Patch) -> dict[str, Tensor]:
    """Return V by layer, on the CPU in float64."""
    return {row.name: patch.feedback(row.name).cpu().double() for row in patch.layers}


def home(got: Gradients) -> Gradients:
    """Return the same on the CPU in float64."""

    def back(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu().double()

    parameters = {name: back(grad) for name, grad in got.parameters.items()}
    return Gradients(got.output.cpu().double(), back(got.input), parameters)


def assert_follows(
    got: Gradients,
    plain: nn.Module,
    feedback: Mapping[str, Tensor],
    x: Tensor,
    tolerance: float = bounds.HALF_OF_FLOAT64,
    **options,
) -> None:
    """Assert that what the device computed agrees with the oracle on the CPU."""
    assert_matches_oracle(home(got), plain, feedback, x, tolerance=tolerance, bit_equal=False, **options)


# --- half precision --------------------------------------------------------------------------------------


def under_autocast(dtype: str) -> Step:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, getattr(torch, dtype)):
            return model(x).float()

    return step


def cnn() -> nn.Module:
    """Two convolutions and a linear layer."""
    return redrawn(
        nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(200, 4)
        )
    )


def assert_half_follows(got: Gradients, plain: nn.Module, feedback, x: Tensor, dtype: str) -> None:
    """Assert that gradients agree with the float64 oracle up to the rounding of `dtype`.

    Backprop's gradients must be more than twice as far away.
    """
    exact, want = by_backprop(plain, x), by_saved_tensors(plain, feedback, x)
    bound = bounds.of_autocast(3, dtype)
    assert_same_gradients(home(got), want, bound, f"in {dtype}")
    upstream = ["input", *(name for name in want.parameters if not name.startswith(layer_names(plain)[-1]))]
    apart = distances(home(got), exact)
    assert all(apart[name] > 2 * bound for name in upstream), apart
