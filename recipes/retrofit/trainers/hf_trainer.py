"""I train with Hugging Face's Trainer; where does the one line go?

Between the model and the Trainer: call `feedbackhook.patch(model)`, then `Trainer(model=model, ...)`. If you
use `model_init`, put the line inside that function. `bf16`, `gradient_accumulation_steps` and
`gradient_checkpointing` work as they do without a patch. A small callback saves the patch's state beside each
checkpoint of the Trainer, so that a resumed run continues with the same V.

On a machine with several GPUs, start it with torchrun or make one GPU visible (CUDA_VISIBLE_DEVICES=0).
Otherwise the Trainer uses nn.DataParallel, under which a patched model raises an error.

The model is a BERT with two layers, built from a configuration without a download. It reads scikit-learn's
digits as sentences of 64 words (the pixels) from a vocabulary of 17 words (their intensities).

    pip install -e '.[trainers]'
    python recipes/retrofit/trainers/hf_trainer.py
    python recipes/retrofit/trainers/hf_trainer.py --epochs 20 --resume runs/hf/checkpoint-570
    python recipes/retrofit/trainers/hf_trainer.py --smoke true
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from shared import digits, make_console, summarize
from torch import Tensor

import feedbackhook

try:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
        set_seed,
    )
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing}; this recipe needs: pip install -e '.[trainers]'") from missing


class KeepFeedback(TrainerCallback):
    """Save the patch's state as `feedback.pt` in the folder of each checkpoint."""

    def __init__(self, patch: feedbackhook.Patch) -> None:
        self.patch = patch

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.patch.state_dict(), folder / "feedback.pt")


def tiny_bert() -> BertForSequenceClassification:
    """Build two layers for sentences of 64 words, a vocabulary of 17 words and 10 classes."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=17,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def digits_as_sentences() -> list[dict[str, Tensor]]:
    """Return scikit-learn's digits, each as 64 words and a label."""
    return [{"input_ids": (16 * image).long().flatten(), "labels": label} for image, label in digits()]


class LearningTrainer(Trainer):
    """A trainer whose optimizer also steps what the feedback learns, for rules such as "KP".

    Args:
        patch: The model's patch.
        options: Those of `Trainer`.
    """

    def __init__(self, patch: feedbackhook.Patch, **options: Any) -> None:
        super().__init__(**options)
        self.patch = patch

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and (learned := list(self.patch.parameters())):
            optimizer.add_param_group({"params": learned, "weight_decay": self.args.weight_decay})
        return optimizer


def main(
    feedback: dict[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float = 1e-3,
    optimizer: str = "adamw_torch",
    seed: int = 0,
    output: Path = Path("runs/hf"),
    resume: Path | None = None,
    smoke: bool = False,
) -> None:
    """Train, save checkpoints and print.

    Args:
        feedback: Keyword arguments of `feedbackhook.patch`: `mode`, the rule's options, `exclude` and so on.
        epochs: Passes over the digits, including those before a resume.
        batch_size: Digits per step.
        lr: Initial learning rate; it falls linearly to zero.
        optimizer: Name of an optimizer, as in `TrainingArguments.optim`.
        seed: Seed of the weights and of the order of the digits.
        output: Folder of the checkpoints.
        resume: Folder of a checkpoint to resume from.
        smoke: Train for a few steps to check that it works (seconds).
    """
    console = make_console()
    set_seed(seed)
    model = tiny_bert()
    patch = feedbackhook.patch(model, **(feedback or {}))  # the one line
    if resume is not None:
        patch.load_state_dict(torch.load(resume / "feedback.pt", weights_only=True))
    trainer = LearningTrainer(
        patch,
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            max_steps=3 if smoke else -1,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            optim=optimizer,
            seed=seed,
            logging_steps=1 if smoke else 10,
            logging_first_step=True,
            save_strategy="steps" if smoke else "epoch",
            save_steps=1,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=digits_as_sentences(),
        callbacks=[KeepFeedback(patch)],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    summarize(console, patch, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
