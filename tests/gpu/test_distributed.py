"""DistributedDataParallel and fully_shard on a GPU, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.gpu import DEVICE, assert_follows, feedback_of, moved
from support.oracle import Gradients, gradients
from support.problems import Net, draw, redrawn
from torch.nn.parallel import DistributedDataParallel

import feedbackhook


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A process group of only this process: NCCL on a GPU, gloo on a CPU."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("order", ["patched before", "inner patched after", "outer patched after"])
@pytest.mark.parametrize("mode", ["sign", "brSF"])
def test_distributed_data_parallel(mode, order, tmp_path):
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    inner = copy.deepcopy(plain).to(DEVICE)
    with process_group(tmp_path):
        if order == "patched before":
            patch = feedbackhook.patch(inner, mode)
        model = DistributedDataParallel(inner, device_ids=[0] if DEVICE == "cuda" else None)
        if order != "patched before":
            patch = feedbackhook.patch(model if order == "outer patched after" else inner, mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            plain.load_state_dict(inner.state_dict())
            feedback = {name.removeprefix("module."): v for name, v in feedback_of(patch).items()}
            got = gradients(inner, x.to(DEVICE), lambda _, x: model(x))
            assert_follows(got, plain, feedback, x, unlike=["input", "stem.weight"])
            optimizer.step()


def test_fully_sharded_data_parallel(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    model, patch = moved(plain, "brSF")
    with process_group(tmp_path):
        mesh = init_device_mesh(DEVICE, (1,))
        fully_shard(model.blocks, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            whole = {name: tensor.full_tensor().cpu() for name, tensor in model.state_dict().items()}
            plain.load_state_dict(whole)
            feedback = feedback_of(patch)
            got = gradients(model, x.to(DEVICE))
            full = {name: grad.full_tensor() for name, grad in got.parameters.items()}
            got = Gradients(got.output, got.input, full)
            assert_follows(got, plain, feedback, x, unlike=["input", "stem.weight"])
            optimizer.step()
