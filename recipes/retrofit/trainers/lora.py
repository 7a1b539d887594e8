"""I adapt a transformer by LoRA; where does the one line go, and what is V then?

After `get_peft_model`, so that the adapters are there to be patched. An adapted layer is then three patched
ones: its frozen base weight W, and the adapter's two, A and B. Its forward is W x + s B A x, s = alpha / r
(Hu et al. 2022, equation 3), and an error signal d at its output goes back as V_W^T d + s V_A^T V_B^T d: each
of the three has a V of its own, drawn from its own signs. So the adapted weight W + s B A as a whole has the
feedback V_W + s V_B V_A, which no longer has the chosen concordance with it. B starts at zero, where a rule
that follows its signs gives V_B = 0: A learns from the second step on, as it does in backprop.

With `exclude` the adapters stay exact, and the error signal is V_W^T d + s A^T B^T d:

    python recipes/retrofit/trainers/lora.py --feedback.exclude '.*[.]lora_.*'

Patching before `get_peft_model` does the same, since the layers that PEFT adds are not patched then (a
warning names them); but V is that of other names, and the table of the patch calls the base layers by their
old names. A layer of `modules_to_save` is a copy that PEFT makes, which is not patched either: patch
afterwards. With DoRA (`use_dora=True`) V follows the weight that DoRA composes.

The task: a vision transformer of two blocks learns scikit-learn's digits by backprop, then its adapters learn
the digits turned by 90 degrees, with feedback.

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
from rich.console import Console
from sklearn.datasets import load_digits
from summary import summarise
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import feedbackhook

try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}; this recipe needs: pip install -e '.[trainers]'") from missing


def tiny_vit() -> VisionTransformer:
    """Two blocks over the 16 patches of an 8x8 image."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4
    )


def adapted(model: nn.Module, rank: int) -> PeftModel:
    """`model`, frozen, with adapters on each linear layer of its blocks."""
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r"blocks.*\.(qkv|proj|fc1|fc2)")
    )


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images `[N, 1, 8, 8]` from 0 to 1, and labels `[N]`."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return images, torch.from_numpy(found.target).long()


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int, lr: float
) -> list[float]:
    """Trains what is not frozen, by AdamW; returns the loss of each step."""
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
    """Train the base by backprop, adapt it with feedback, print.

    Args:
        feedback: the arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        base_epochs: passes over the digits by backprop, before the adapters are there.
        epochs: passes over the turned digits, in which the adapters learn.
        rank: of the adapters.
        batch_size: images a step.
        base_lr: learning rate of the base.
        lr: learning rate of the adapters.
        seed: of the weights and of the order of the images.
        smoke: a few steps, to see that it works: seconds.
    """
    console = Console(soft_wrap=True, width=200)  # no name in the table is cut
    torch.manual_seed(seed)
    images, labels = digits()
    if smoke:
        images, labels, base_epochs, epochs = images[:128], labels[:128], 1, 2
    base = tiny_vit()
    losses = train(base, images, labels, base_epochs, batch_size, base_lr)
    console.print(f"base, by backprop: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    model = adapted(base, rank)
    patch = feedbackhook.patch(model, **(feedback or {}))  # the one line
    losses = train(model, torch.rot90(images, dims=(2, 3)), labels, epochs, batch_size, lr)
    summarise(console, patch, losses)


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
