"""The recipe for Hugging Face's Trainer.

The weights after a few steps are those of a plain loop with the same patch on the same batches, whose
gradients are the oracle's and not backprop's.
"""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.bounds import HALF_OF_FLOAT32
from support.oracle import TOLERANCE
from support.trainers import BRSF, assert_told, distance, load_trainer, moved, plain_loop, sgd
from torch import Tensor

import feedbackhook


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    return load_trainer("hf_trainer")


HF_OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", HF_OPTIONS)
def test_the_trainer_of_transformers_trains_as_a_plain_loop_does(hf, case, tmp_path):
    steps, size = 2, 4
    given = HF_OPTIONS[case]
    accumulated = given.get("gradient_accumulation_steps", 1)
    seen: list[dict[str, Tensor]] = []

    def collate(items):
        seen.append({key: torch.stack([item[key] for item in items]) for key in items[0]})
        return seen[-1]

    def mean(outputs, labels, num_items_in_batch=None):  # over all batches of a step
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / (size * accumulated)

    start = hf.tiny_bert()
    if case != "bf16":  # autocast leaves float64 as it is
        start.double()
    model = copy.deepcopy(start)
    patch = feedbackhook.patch(model, **BRSF)
    hf.Trainer(
        model=model,
        args=hf.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=size,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **given,
        ),
        train_dataset=hf.digits_as_sentences()[: size * steps * accumulated],
        data_collator=collate,
        compute_loss_func=mean,
    ).train()

    def loss_of(m, batches, bf16=case == "bf16"):
        cast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with cast:
            words = torch.cat([batch["input_ids"] for batch in batches])
            return F.cross_entropy(m(input_ids=words).logits, torch.cat([b["labels"] for b in batches]))

    batches = [seen[i : i + accumulated] for i in range(0, steps * accumulated, accumulated)]
    assert len({batch["input_ids"].sum().item() for batch in seen}) == steps * accumulated
    loop = functools.partial(plain_loop, batches=batches, loss_of=loss_of)
    checked = TOLERANCE if case == "as it is" else None  # the oracle does not see bfloat16's copies of W
    plain_sgd = functools.partial(sgd, momentum=0.0)
    want = loop(copy.deepcopy(start), BRSF, optimizer=plain_sgd, tolerance=checked)
    exact = loop(copy.deepcopy(start), None, optimizer=plain_sgd)
    close = TOLERANCE
    if case == "bf16":  # both round to bfloat16 alike and sum in float32; without autocast it would show
        close = HALF_OF_FLOAT32
        uncast = functools.partial(loss_of, bf16=False)
        other = loop(copy.deepcopy(start), BRSF, loss_of=uncast, optimizer=plain_sgd)
        assert distance(moved(model, start), moved(other, start)) > close
    assert distance(moved(model, start), moved(want, start)) <= close
    assert distance(moved(model, start), moved(exact, start)) > 0.1
    assert all(row.rerouted == steps * accumulated for row in patch.layers)


def test_the_recipe_for_transformers_runs_and_goes_on_with_the_same_v(hf, tmp_path, capsys):
    hf.main(BRSF, output=tmp_path / "a", smoke=True)
    out = capsys.readouterr().out
    assert_told(out, ["bert.encoder.layer.0.attention.self.query", "classifier"], rerouted=3)
    first = tmp_path / "a" / "checkpoint-2"
    state = torch.load(first / "feedback.pt", weights_only=True)
    assert {row["draws"] for row in state["layers"].values()} == {2}

    def end(output, resume):
        hf.main(BRSF, output=output, resume=resume, smoke=True)
        return hf.BertForSequenceClassification.from_pretrained(output / "checkpoint-3")

    whole = hf.BertForSequenceClassification.from_pretrained(tmp_path / "a" / "checkpoint-3")
    start = hf.BertForSequenceClassification.from_pretrained(first)
    again = end(tmp_path / "b", first)
    assert_told(capsys.readouterr().out, ["classifier"], rerouted=1)
    assert distance(moved(again, start), moved(whole, start)) <= HALF_OF_FLOAT32
    for row in state["layers"].values():  # with another V it would not be the same
        row["draws"] = 0
    torch.save(state, first / "feedback.pt")
    assert distance(moved(end(tmp_path / "c", first), start), moved(whole, start)) > 0.01
