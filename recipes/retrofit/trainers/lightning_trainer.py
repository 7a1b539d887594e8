"""I train with Lightning; where does the one line go?

Into the LightningModule, at the end of `__init__`, once its layers exist. A LightningModule that makes its
layers in `configure_model` has the line at the end of that, before `fully_shard` if it is called there; since
Lightning calls `configure_model` again before each fit and test, it begins with
`if feedbackhook.get_patch(self) is None:`. Trainer, loop and optimizer stay as they are. Two hooks put what
decides V into Lightning's checkpoints, so that a run which goes on from one goes on with the same V.

`patch.watch` cannot follow automatic optimization, in which Lightning runs the backward inside
`optimizer.step(closure)`, and says so; call `feedbackhook.measure(patch, loss)` in `training_step`.

    pip install -e '.[trainers]'
    python recipes/retrofit/trainers/lightning_trainer.py
    python recipes/retrofit/trainers/lightning_trainer.py --epochs 20 --resume runs/lightning/last.ckpt
    python recipes/retrofit/trainers/lightning_trainer.py --smoke true
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import feedbackhook

try:
    import lightning as L
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}; this recipe needs: pip install -e '.[trainers]'") from missing


class Classifier(L.LightningModule):
    """A small convolutional network for digits.

    Args:
        feedback: the arguments of `feedbackhook.patch`; None: its defaults.
        lr: learning rate of SGD with momentum 0.9.
    """

    def __init__(self, feedback: dict[str, Any] | None = None, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        self.losses: list[float] = []
        self.patch = feedbackhook.patch(self, **(feedback or {}))  # the one line

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["feedback"] = self.patch.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.patch.load_state_dict(checkpoint["feedback"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def digits() -> TensorDataset:
    """scikit-learn's digits: images `[N, 1, 8, 8]` from 0 to 1, and labels `[N]`."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return TensorDataset(images, torch.from_numpy(found.target).long())


def main(
    feedback: dict[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.01,
    seed: int = 0,
    output: Path = Path("runs/lightning"),
    resume: Path | None = None,
    smoke: bool = False,
) -> None:
    """Train, save a checkpoint, print.

    Args:
        feedback: the arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        epochs: passes over the digits, those of a resumed run included.
        batch_size: images a step.
        lr: learning rate.
        seed: of the weights and of the order of the images.
        output: the folder of the checkpoint, `last.ckpt`.
        resume: a checkpoint to go on from.
        smoke: a few steps, to see that it works: seconds.
    """
    console = Console(soft_wrap=True, width=200)  # no name in the table is cut
    L.seed_everything(seed, verbose=False)
    model = Classifier(feedback, lr)
    trainer = L.Trainer(
        max_epochs=1 if smoke else epochs,
        limit_train_batches=5 if smoke else None,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(digits(), batch_size=batch_size, shuffle=True), ckpt_path=resume)
    trainer.save_checkpoint(output / "last.ckpt")
    summarise(console, model.patch, model.losses)
    console.print(f"checkpoint: {output / 'last.ckpt'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
