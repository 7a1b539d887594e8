"""The text of characters.py: where it comes from, its parts, and what simple counts predict."""

from __future__ import annotations

import importlib
import re

import torch
from torch import Tensor

MIN_CHARACTERS = 100_000
"""With fewer, `pydoc_data.topics` does not hold the texts that Python ships."""


def shipped_text() -> str:
    """Return the texts of `pydoc_data.topics`, sorted by name, with each paragraph once.

    Some topics repeat sections of others, and no training paragraph may appear in the test text.

    Raises:
        ModuleNotFoundError: This Python has no such texts, or very little text.
    """
    hint = "use a Python that has it (python.org, pyenv), or train on your own text: --text FILE"
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this Python has no pydoc_data.topics; {hint}") from error
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics[name].strip() for name in sorted(topics)))
    once: dict[str, str] = {}
    for paragraph in paragraphs:
        once.setdefault(" ".join(paragraph.split()), paragraph)
    text = "\n\n".join(once.values())
    if len(text) < MIN_CHARACTERS:
        raise ModuleNotFoundError(
            f"pydoc_data.topics has {len(text)} characters in this Python, "
            f"fewer than {MIN_CHARACTERS}; {hint}"
        )
    return text


def split(text: str) -> tuple[str, str, str]:
    """Split into training, validation and test text; the last two are a tenth each."""
    tenth = len(text) // 10
    return text[: -2 * tenth], text[-2 * tenth : -tenth], text[-tenth:]


def alphabet(*texts: str) -> str:
    """Return the different characters of the texts, sorted."""
    return "".join(sorted(set("".join(texts))))


def encode(text: str, characters: str) -> Tensor:
    """Replace each character by its index in `characters`: integers of shape [len(text)]."""
    indices = {character: index for index, character in enumerate(characters)}
    return torch.tensor([indices[character] for character in text])


def count_model_bits(training: Tensor, test: Tensor, vocabulary: int) -> tuple[float, float]:
    """Return the bits per character of the test text, predicted from counts in the training text.

    The first number uses counts of single characters, the second counts of characters given the one before.
    One is added to each count.
    """
    single = torch.bincount(training, minlength=vocabulary).double() + 1
    pairs = torch.bincount(training[:-1] * vocabulary + training[1:], minlength=vocabulary**2).double() + 1
    pairs = pairs.reshape(vocabulary, vocabulary)
    single, pairs = single / single.sum(), pairs / pairs.sum(1, keepdim=True)
    return -single[test[1:]].log2().mean().item(), -pairs[test[:-1], test[1:]].log2().mean().item()
