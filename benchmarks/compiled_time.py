"""What does `protocol.compile` gain, and after how many steps has it paid for compiling?

For each network and rule two runs, one of them compiled, take turns in one process, one training step each,
in a random order: the steps of `feedbackhook train`, on random images, without records. Seconds of an epoch
are those of a step times the number of steps. Compiling starts with an empty cache; starting the compiler
itself, which each process does once, is timed apart.

    python benchmarks/compiled_time.py --threads 2

Writes benchmarks/results/compiled_time.csv, a row for each network and rule: medians, with quartiles.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable

import pandas as pd
import torch
from common import RESULTS
from jsonargparse import auto_cli

from feedbackhook.experiments.config import (
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    ProtocolConfig,
    RecordConfig,
    RunConfig,
)
from feedbackhook.experiments.data.load import ImageData
from feedbackhook.experiments.data.split import Split
from feedbackhook.experiments.resolve import resolve
from feedbackhook.experiments.training.compiled import compile_network
from feedbackhook.experiments.training.distributed import DistributedContext
from feedbackhook.experiments.training.state import TrainingState
from feedbackhook.experiments.training.step import train_step
from feedbackhook.store.recorder import Recorder

CASES = {
    "liao2016/mnist": (1, 28, 100, 60_000),
    "liao2016/cifar": (3, 32, 100, 50_000),
    "timm/resnet18": (3, 64, 32, 50_000),
}
"""Channels, pixels, batch size and number of training images, by network."""


def main(
    networks: tuple[str, ...] = tuple(CASES),
    rules: tuple[str, ...] = ("backprop", "frSF", "brSF"),
    rounds: int = 40,
    threads: int = 2,
    name: str = "compiled_time",
) -> None:
    """Measure and print.

    Args:
        networks: Networks, of those that this file lists.
        rules: Rules; "backprop" is a network without a patch.
        rounds: Measured steps of each run; three more before them are not measured.
        threads: CPU threads.
        name: Name of the CSV file.
    """
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        begin = time.perf_counter()
        torch.compile(torch.neg)(torch.ones(2))
        start = time.perf_counter() - begin
        with Recorder(f"{folder}/run") as recorder:
            rows = [
                {**_measure(network, rule, rounds, threads, recorder), "start_seconds": start}
                for network in networks
                for rule in rules
            ]
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4f")
    columns = ["eager_epoch", "compiled_epoch", "ratio", "compile_seconds", "pays_after_steps"]
    print(table.set_index(["network", "rule"])[columns].to_string(float_format="%.3f"))
    print(f"The compiler starts in {start:.1f} s.")


def _measure(network: str, rule: str, rounds: int, threads: int, recorder: Recorder) -> dict[str, object]:
    _, _, batch, count = CASES[network]
    torch.set_num_threads(threads)
    eager, compiled = (_state(network, rule, threads, compile) for compile in (False, True))
    begin = time.perf_counter()
    compile_network(compiled)
    seconds = time.perf_counter() - begin
    index = torch.arange(batch)

    def step_of(state: TrainingState) -> Callable[[], float]:
        state.context.distribute(state.model, state.optimizer)
        state.step = 1  # the steps that are measured are not recorded
        state.train_mode()

        def step() -> float:
            begin = time.perf_counter()
            train_step(state, index, recorder, last=False)
            return time.perf_counter() - begin

        return step

    steps = {"eager": step_of(eager), "compiled": step_of(compiled)}
    taken: dict[str, list[float]] = {how: [] for how in steps}
    for _ in range(rounds + 3):
        for how in random.sample(list(steps), 2):
            taken[how].append(steps[how]())
    for state in (eager, compiled):
        state.close()
    times = pd.DataFrame(taken).iloc[3:]
    times["ratio"] = times["compiled"] / times["eager"]
    row: dict[str, object] = {"network": network, "rule": rule, "batch": batch, "threads": threads}
    for column, factor in {"eager": count // batch, "compiled": count // batch, "ratio": 1}.items():
        label = column if column == "ratio" else f"{column}_epoch"
        quartiles = (times[column] * factor).quantile([0.5, 0.25, 0.75])
        row |= dict(zip([label, f"{label}_q1", f"{label}_q3"], quartiles, strict=True))
    gained = float(times["eager"].median() - times["compiled"].median())
    pays = round(seconds / gained) if gained > 0 else float("nan")
    return {**row, "compile_seconds": seconds, "pays_after_steps": pays, "torch": torch.__version__}


def _state(network: str, rule: str, threads: int, compile: bool) -> TrainingState:
    channels, size, batch, _ = CASES[network]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (batch,), generator=generator))
    half = torch.full((channels, 1, 1), 0.5)
    config = resolve(
        RunConfig(
            data=DataConfig(size=size),
            model=ModelConfig(network),
            feedback=FeedbackConfig(None if rule == "backprop" else rule),
            optimizer=OptimizerConfig("sgd", lr=1e-4),
            protocol=ProtocolConfig(batch_size=batch, threads=threads, device="cpu", compile=compile),
            record=RecordConfig(every=1_000_000),
        )
    )
    torch.manual_seed(0)
    images_of_run = ImageData(split, split, None, 10, half, half)
    return TrainingState(config, images_of_run, DistributedContext(config.protocol))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
