"""Are the random numbers that V is drawn from random? Pipe them into a battery of tests.

    python benchmarks/rng_battery.py draws --gigabytes 4 -- RNG_test stdin16 -tlmax 4GB
    python benchmarks/rng_battery.py layers --gigabytes 4 -- dieharder -a -g 200

`RNG_test` is PractRand's. The command reads raw 16-bit numbers: all bits of every word that is hashed. They
come in one of these orders:

    draws     one layer's draws of 2**22 numbers, one after the other, as a layer is redrawn
    layers    the numbers of 64 layers and 64 draws of each in turn: neighbors differ in layer or draw only
    seeds     the numbers of 4,096 seeds that follow each other in turn, and of two streams of each

The results are in benchmarks/results/rng_battery.md.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator

import torch
from torch import Tensor

from feedbackhook import CounterRNG, LayerInfo


def main() -> None:
    """Run the command with the numbers as its input; exit with its status."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("order", choices=ORDERS)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="how many GiB to send at most")
    parser.add_argument("command", nargs="+", help="the battery, after --")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with subprocess.Popen(given.command, stdin=subprocess.PIPE) as battery:
        assert battery.stdin is not None
        left = int(given.gigabytes * 2**30)
        try:
            for numbers in ORDERS[given.order]():
                if left <= 0:
                    break
                # Exact: each number is (k + 0.5) / 65536.
                sent = numbers.mul(65536).to(torch.int32).sub(32768).to(torch.int16).numpy().tobytes()[:left]
                battery.stdin.write(sent)
                left -= len(sent)
            battery.stdin.close()
        except BrokenPipeError:  # the battery has read enough
            pass
    sys.exit(battery.returncode)


def _drawn(n: int, seed: int = 0, layer: str = "layer1.0.conv1", count: int = 0, stream: str = "") -> Tensor:
    rng = CounterRNG(seed, LayerInfo(layer, "Linear", (n,), n), count)
    return rng.uniform16(torch.empty(n), stream)


def _draws() -> Iterator[Tensor]:
    count = 0
    while True:
        yield _drawn(1 << 22, count=count, stream="magnitude")
        count += 1


def _layers() -> Iterator[Tensor]:
    first = 0
    while True:
        each = [
            _drawn(1 << 12, layer=f"blocks.{layer}.mlp.fc1", count=first + count, stream="magnitude")
            for layer in range(64)
            for count in range(64)
        ]
        yield torch.stack(each, 1).flatten()
        first += 64


def _seeds() -> Iterator[Tensor]:
    first = 0
    while True:
        each = [
            _drawn(1 << 11, seed=first + seed, stream=stream)
            for seed in range(4096)
            for stream in ("magnitude", "sign")
        ]
        yield torch.stack(each, 1).flatten()
        first += 4096


ORDERS = {"draws": _draws, "layers": _layers, "seeds": _seeds}

if __name__ == "__main__":
    main()
