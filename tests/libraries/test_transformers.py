"""Models of transformers, at tiny sizes: each layer is rerouted, and a weight of no layer is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import feedbackhook

WORDS = torch.arange(16).reshape(2, 8) + 2
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CAUSAL = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 16}
GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def of_words(model: nn.Module) -> Tensor:
    return model(input_ids=WORDS, labels=WORDS).loss


def of_images(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


class Case(NamedTuple):
    """A model, its step, and what is expected of the layers.

    Args:
        build: makes the model.
        layers: how many can be patched.
        loss: of the model's step.
        exact: weights that no layer holds.
        first: the layers that have no error signal to send on.
    """

    build: Callable[[], nn.Module]
    layers: int
    loss: Callable[[nn.Module], Tensor] = of_words
    exact: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


CASES = {
    "GPT-2": Case(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)), 9),
    "GPT-2, checkpointed": Case(
        lambda: checkpointed(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **NO_DROPOUT))), 9
    ),
    "BERT": Case(lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=16)), 14),
    "Llama": Case(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL)), 15),
    "Llama, tied head": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL, tie_word_embeddings=True)), 15
    ),
    "Mixtral": Case(
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**CAUSAL, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True)
        ),
        9,
        exact=("model.layers.0.mlp", "model.layers.1.mlp"),
    ),
    "T5": Case(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)), 33),
    "ViT": Case(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                **{name: size for name, size in SMALL.items() if name != "vocab_size"},
                image_size=32,
                patch_size=8,
                num_labels=3,
            )
        ),
        14,
        of_images,
        first=("vit.embeddings.patch_embeddings.projection",),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_layer_is_rerouted(case):
    model = case.build().train()
    layers = {name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    layers |= {name for name, part in model.named_modules() if type(part).__name__ == "Conv1D"}
    patch = feedbackhook.patch(model, "sign")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            case.loss(model).backward()
    said = [str(warning.message) for warning in said if "error signal" in str(warning.message)]
    assert len(said) == bool(case.exact)
    assert all(name in said[0] for name in case.exact)
    if not case.exact:  # of newer and older versions of Mixtral, the experts are other modules
        assert len(patch.layers) == case.layers
    assert len(patch.layers) == len(layers)
    assert {row.name for row in patch.layers if not row.rerouted} == set(case.first)
    assert {row.name for row in patch.layers if row.input_requires_grad is False} == set(case.first)
