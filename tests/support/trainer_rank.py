"""What torchrun runs in each process of the test of the recipe for several processes."""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import feedbackhook
from support.bounds import HANG
from support.oracle import TOLERANCE
from support.problems import redrawn
from support.trainers import (
    RULES,
    SIGN,
    cross_entropy,
    distance,
    images,
    load_trainer,
    moved,
    plain_loop,
    sgd,
    weights_of,
)

WORLD = 2
STRATEGIES = ("ddp", "fsdp2")


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_rank() -> None:
    """What each process of the two-process test does."""
    torch.set_num_threads(1)
    recipe = load_trainer("distributed")
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG))
    data = images(48)
    loaders = [
        DataLoader(data, batch_size=8, sampler=DistributedSampler(data, WORLD, rank, drop_last=True))
        for rank in range(WORLD)
    ]
    halves = zip(*loaders, strict=True)
    whole = [[torch.cat(parts) for parts in zip(*of_ranks, strict=True)] for of_ranks in halves]
    assert len(whole) == 3
    for strategy in STRATEGIES:
        for name, rule in RULES.items():
            start = redrawn(recipe.CNN())
            model = copy.deepcopy(start)
            patch = feedbackhook.patch(model, **rule)
            cpu = torch.device("cpu")
            losses = recipe.train(recipe.wrapped(model, strategy, cpu), data, 1, 8, 0.1, cpu)
            got = {key: gathered(value) for key, value in weights_of(model).items()}
            want = plain_loop(copy.deepcopy(start), rule, whole, cross_entropy, sgd)
            exact = plain_loop(copy.deepcopy(start), None, whole, cross_entropy, sgd)
            assert distance(moved(got, start), moved(want, start)) <= TOLERANCE
            assert distance(moved(got, start), moved(exact, start)) > 0.1
            assert abs(losses[0] - cross_entropy(start, whole[0]).item()) < TOLERANCE
            assert [row.rerouted for row in patch.layers] == [0, 3, 3, 3]
            if dist.get_rank() == 0:
                print(f"passed {strategy} {name}", flush=True)
    # One group is enough: that of another begun at once may meet what the first has left in torchrun's store.
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    for strategy in STRATEGIES:
        if dist.get_rank() == 0:
            print("the recipe itself:", flush=True)
        recipe.main(strategy, SIGN, smoke=True)


if __name__ == "__main__":
    one_rank()
    # Gloo's threads may still hold tensors while the interpreter shuts down, which sometimes aborts the
    # process, with plain torch.distributed too (pytorch/pytorch#179291). All work is done, so exit at once.
    sys.stdout.flush()
    os._exit(0)
