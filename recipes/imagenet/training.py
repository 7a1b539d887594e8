"""One epoch of training, and the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

Batches = Iterator[tuple[Tensor, Tensor]]


def seed_of(seed: int, epoch: int, process: int) -> int:
    """Return the seed of an epoch's augmentation in a process, so that checkpoints need no random state."""
    return int(np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)[0] >> 1)


def train_epoch(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Batches
) -> dict[str, float]:
    """Train for one epoch; return its mean loss and top-1 error in percent, over all processes."""
    model.train()
    # loss, wrong, images: float32 is exact for integers up to 2^24
    total = torch.zeros(3, device=accelerator.device)
    for x, y in batches:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        wrong = (logits.detach().argmax(1) != y).sum()
        total += torch.stack([loss.detach() * len(y), wrong, torch.ones_like(wrong) * len(y)])
    loss_sum, wrong_sum, images = accelerator.reduce(total, "sum").tolist()
    return {"train_loss": loss_sum / images, "train_error": 100 * wrong_sum / images}


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Return the mean loss, and top-1 and top-5 error in percent (top-5 is 0 with five classes or fewer)."""
    model.eval()
    total, images = torch.zeros(3, device=accelerator.device), 0
    for x, y in batches:
        logits = model(x)
        hit = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="none")
        rows = torch.stack([loss, ~hit[:, 0], ~hit.any(1)], dim=1)
        rows = accelerator.gather_for_metrics(rows)  # drops the samples that pad the last batch
        total += rows.sum(0)
        images += len(rows)
    loss_sum, wrong, wrong_of_five = total.tolist()
    return {
        "test_loss": loss_sum / images,
        "test_error": 100 * wrong / images,
        "test_accuracy": 100 * (1 - wrong / images),
        "test_error_top5": 100 * wrong_of_five / images,
    }
