"""A tiny dataset, and a run on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feedbackhook.experiments.config import (
    DataConfig,
    FeedbackConfig,
    OptimizerConfig,
    ProtocolConfig,
    RunConfig,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bright squares in one of two corners: 40 images to learn from, 10 to test with, 28x28."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for label in range(2):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (28, 28), dtype=np.uint8)
                pixels[4 + 12 * label :, 4 + 12 * label :][:8, :8] += 90
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return f"imagefolder:{root}"


@pytest.fixture
def config(images: str, tmp_path: Path) -> RunConfig:
    """Three steps of 12 images an epoch."""
    return RunConfig(
        data=DataConfig(images),
        feedback=FeedbackConfig("frSF"),
        optimizer=OptimizerConfig(lr=2e-4),
        protocol=ProtocolConfig(epochs=4, batch_size=12, threads=1),
        output=str(tmp_path / "run"),
    )
