"""I train with Lightning; where does the one line go?

At the end of the LightningModule's `__init__`, when its layers exist. If the layers are built in
`configure_model`, put the line at its end, but before any `fully_shard`. Lightning calls `configure_model`
again before each fit and test, so guard the line with `if feedbackhook.get_patch(self) is None:`. Trainer,
loop and optimizer stay as they are. Two hooks save the patch's state in Lightning's checkpoints, so that a
resumed run continues with the same V.

`patch.watch` does not support automatic optimization, where Lightning runs the backward pass inside
`optimizer.step(closure)`, and raises an error. Call `feedbackhook.measure(patch, loss)` in `training_step`
instead.

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
from shared import digits, make_console, summarize
from torch import Tensor, nn
from torch.utils.data import DataLoader

import feedbackhook

try:
    import lightning as L
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}; this recipe needs: pip install -e '.[trainers]'") from missing


class Classifier(L.LightningModule):
    """A small convolutional network for the digits.

    Args:
        feedback: Keyword arguments of `feedbackhook.patch`. Default: None, its own defaults.
        lr: Learning rate of SGD with momentum 0.9.
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
        # rules such as "KP" learn their feedback, which is not among the model's parameters
        return torch.optim.SGD(
            [*self.parameters(), *self.patch.parameters()], lr=self.hparams.lr, momentum=0.9
        )


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
    """Train, save a checkpoint and print.

    Args:
        feedback: Keyword arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        epochs: Passes over the digits, including those before a resume.
        batch_size: Images per step.
        lr: Learning rate.
        seed: Seed of the weights and of the order of the images.
        output: Folder of the checkpoint, `last.ckpt`.
        resume: Checkpoint to resume from.
        smoke: Train for a few steps to check that it works (seconds).
    """
    console = make_console()
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
    summarize(console, model.patch, model.losses)
    console.print(f"checkpoint: {output / 'last.ckpt'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
