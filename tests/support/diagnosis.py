"""Networks, batches and traces for the tests of profiles and diagnoses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackhook
from support.problems import draw, redrawn


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def net() -> nn.Sequential:
    """Three layers, float64."""
    return redrawn(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), seed=3
    )


def batches(count: int = 3, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random ones for `net`."""
    seeds = range(2 * count * seed, 2 * count * (seed + 1), 2)
    return [(draw(size, 5, seed=s), draw(size, 3, seed=s + 1)) for s in seeds]


class Stream(nn.Module):
    """A residual block between two layers, float32, with a stream that `scale` multiplies before the block
    and before the last normalization."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.scale = scale
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.scale * self.stem(x)
        return self.head(self.norm(stream + self.block(stream)))


class Busy(nn.Module):
    """A network whose forward changes buffers and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.still = nn.BatchNorm1d(8).eval()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.still(self.body(x)))


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that must be the same afterwards, as copies."""
    hooks = {
        name: [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        for name, module in model.named_modules()
    }
    return {
        "state": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "identities": [id(x) for x in (*model.parameters(), *model.buffers())],
        "versions": [p._version for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad objects": [id(p.grad) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": hooks,
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "gradients on": torch.is_grad_enabled(),
        "patch": id(feedbackhook.get_patch(model)) if feedbackhook.get_patch(model) else None,
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Nothing differs between two traces, bit by bit."""
    assert type(before) is type(after), where
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key, value in before.items():
            assert_same(value, after[key], f"{where}/{key}")
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), where
        for place, pair in enumerate(zip(before, after, strict=True)):
            assert_same(*pair, f"{where}/{place}")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    else:
        assert before == after, where
