"""I adapt a transformer by LoRA; where does the one line go, and what is V then?

After `get_peft_model`, so that the adapters are patched too. Each adapted layer then consists of three
patched layers: the frozen base weight W, and the adapter's weights A and B. Its forward pass is W x + s B A x
with s = alpha / r (Hu et al. 2022, equation 3). An error signal d at its output is sent back as
V_W^T d + s V_A^T V_B^T d: each of the three layers has its own V, which depends on its own signs. The adapted
weight W + s B A as a whole therefore has the feedback V_W + s V_B V_A, which does not have the chosen
concordance with it. B is initialized to zero, where a rule that follows its signs gives V_B = 0, so A learns
from the second step on, as in backprop.

With `exclude` the adapters keep backprop, and the error signal is V_W^T d + s A^T B^T d:

    python recipes/retrofit/trainers/lora.py --feedback.exclude '.*[.]lora_.*'

Patching before `get_peft_model` has the same effect, because the layers that PEFT adds are then not patched
(a warning lists them). But V is drawn for the old layer names, which the patch's table also shows. Layers in
`modules_to_save` are copied by PEFT, and the copies are not patched either: patch afterwards. With DoRA
(`use_dora=True`) V follows the weight that DoRA composes.

The task: a vision transformer with two blocks learns scikit-learn's digits by backprop. Then its adapters
learn the digits rotated by 90 degrees, with feedback.

    pip install -e '.[trainers]'
    python recipes/retrofit/trainers/lora.py
    python recipes/retrofit/trainers/lora.py --smoke true
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from shared import digits, make_console, summarize
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import feedbackhook

try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}; this recipe needs: pip install -e '.[trainers]'") from missing


def tiny_vit() -> VisionTransformer:
    """Build two blocks over the 16 patches of an 8x8 image."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4
    )


def adapted(model: nn.Module, rank: int) -> PeftModel:
    """Freeze `model` and add adapters to each linear layer of its blocks."""
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r"blocks.*\.(qkv|proj|fc1|fc2)")
    )


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int, lr: float
) -> list[float]:
    """Train the parameters that are not frozen by AdamW; return the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(epochs):
        for x, y in DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main(
    feedback: dict[str, Any] | None = None,
    base_epochs: int = 10,
    epochs: int = 10,
    rank: int = 4,
    batch_size: int = 64,
    base_lr: float = 2e-3,
    lr: float = 5e-3,
    seed: int = 0,
    smoke: bool = False,
) -> None:
    """Train the base by backprop, adapt it with feedback, and print.

    Args:
        feedback: Keyword arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        base_epochs: Passes over the digits by backprop, before the adapters are added.
        epochs: Passes over the rotated digits, in which the adapters learn.
        rank: Rank of the adapters.
        batch_size: Images per step.
        base_lr: Learning rate of the base.
        lr: Learning rate of the adapters.
        seed: Seed of the weights and of the order of the images.
        smoke: Train for a few steps to check that it works (seconds).
    """
    console = make_console()
    torch.manual_seed(seed)
    images, labels = digits().tensors
    if smoke:
        images, labels, base_epochs, epochs = images[:128], labels[:128], 1, 2
    base = tiny_vit()
    losses = train(base, images, labels, base_epochs, batch_size, base_lr)
    console.print(f"base, by backprop: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    model = adapted(base, rank)
    patch = feedbackhook.patch(model, **(feedback or {}))  # the one line
    losses = train(model, torch.rot90(images, dims=(2, 3)), labels, epochs, batch_size, lr)
    summarize(console, patch, losses)


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
