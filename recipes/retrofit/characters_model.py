"""The transformer of characters.py and its loss. Shapes: N batch, T context, C width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention, [N, T, C] to [N, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron on the residual stream, each after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharacterTransformer(nn.Module):
    """Scores of the next character at each position: [N, T] indices to [N, T, vocabulary]."""

    def __init__(self, vocabulary: int, blocks: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, indices: Tensor) -> Tensor:
        positions = torch.arange(indices.shape[1], device=indices.device)
        return self.head(self.norm(self.blocks(self.character(indices) + self.position(positions))))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of all characters but the first of windows [N, T + 1]."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_character(model: nn.Module, indices: Tensor, context: int) -> float:
    """Return the loss over a whole text, cut into adjacent windows that do not see each other."""
    windows = indices.unfold(0, context + 1, context)
    losses = [loss_of(model, part).item() * len(part) for part in windows.split(128)]
    return sum(losses) / len(windows) / math.log(2)
