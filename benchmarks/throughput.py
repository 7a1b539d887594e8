"""Is a small network starved by the training around it? Images a second, beside a bare loop.

`feedbackhook train` and a bare loop over normalised tensors in memory take turns in one process, an epoch
each: the paper's MNIST network, mini-batches of 100, SGD, on random images. The bare loop shuffles, takes a
step, and nothing else; the run also records losses, errors and, each 50th step, what `patch.watch` sees, and
writes its checkpoint. Evaluations are not in the time.

    python benchmarks/throughput.py

Writes benchmarks/results/throughput.csv, a row an epoch.
"""

from __future__ import annotations

import tempfile
import time

import pandas as pd
import torch
import torch.nn.functional as F
from common import RESULTS
from jsonargparse import auto_cli

from feedbackhook.experiments.config import (
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.data.split import Split
from feedbackhook.experiments.models.build import build
from feedbackhook.experiments.training.progress import Progress
from feedbackhook.experiments.training.run import train

BATCH = 100


def main(
    conditions: tuple[str, ...] = ("SGD", "BN", "frSF+BN"),
    images: int = 60_000,
    epochs: int = 5,
    threads: int = 1,
) -> None:
    """Measures and prints.

    Args:
        conditions: of the run; the bare loop is always plain backprop, with the same normalisation.
        images: in the training set.
        epochs: of each, after one that does not count.
        threads: CPU threads.
    """
    rows = [row for condition in conditions for row in _compare(condition, images, epochs, threads)]
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "throughput.csv", index=False, float_format="%.4f")
    table["ratio"] = table["run_seconds"] / table["bare_seconds"]
    print(
        table.groupby("condition", sort=False)[["run_seconds", "bare_seconds", "ratio"]].median().to_string()
    )


def _compare(condition: str, count: int, epochs: int, threads: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (count,), generator=generator))
    half = torch.full((1, 1, 1), 0.5)
    data = ImageData(split, Split(images[:BATCH], split.labels[:BATCH]), None, 10, half, half)
    bare = _BareLoop(condition, data)
    rows: list[dict[str, object]] = []
    begun = 0.0

    def take_turns(now: Progress) -> None:
        nonlocal begun
        if now.test_error is None and now.batch == now.batches:
            rows.append(
                {"condition": condition, "epoch": now.epoch, "run_seconds": time.perf_counter() - begun}
            )
        elif now.test_error is not None:
            if rows:
                begun = time.perf_counter()
                bare.epoch()
                rows[-1]["bare_seconds"] = time.perf_counter() - begun
            begun = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            condition=condition,
            optimizer=OptimizerConfig(lr=1e-4),
            protocol=ProtocolConfig(epochs=epochs + 1, batch_size=BATCH, threads=threads, device="cpu"),
            record=RecordConfig(figures=False),
            output=f"{folder}/run",
        )
        train(config, progress=take_turns, images=data)
    return rows[1:]


class _BareLoop:
    """Nothing but training, on images that are normalised beforehand."""

    def __init__(self, condition: str, data: ImageData) -> None:
        norm = "affine" if condition == "BN" else "paper" if "BN" in condition else "none"
        model = build(ModelConfig("liao2016/mnist", norm), 10, 1, (28, 28))
        self.model = model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, 0.9, weight_decay=5e-4)
        self.x = (data.train.images.float() / 255 - data.mean) / data.std
        self.y = data.train.labels

    def epoch(self) -> None:
        for index in torch.randperm(len(self.y)).split(BATCH):
            loss = F.cross_entropy(self.model(self.x[index]), self.y[index])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
