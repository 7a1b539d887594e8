"""One rank of the two-process tests: `torchrun distributed_worker.py CASE FOLDER JOB-RULE-ORDER ...`.

Every rank holds half of a batch. What its patched, wrapped model gives is compared with one process on the
whole batch, whose gradients in turn are those of tests/support/oracle.py. A failed comparison ends the
process with an error; rank 0 prints the largest differences.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import feedbackhook
from feedbackhook import Patch, Recorder, patch, read
from support import bounds
from support.direct import by_hooks
from support.oracle import UNLIKE, literal_backward_hooks, swapped_saved_tensors
from support.problems import draw, redrawn

RULES: dict[str, dict[str, Any]] = {
    "sign": {"mode": "sign", "concordance": 0.8, "seed": 3},
    "brSF": {"mode": "brSF", "concordance": 0.8, "seed": 3},
    "symmetric": {"mode": "symmetric"},
    "DFA": {"mode": "DFA", "seed": 3},
    "shared": {"mode": "DFA", "seed": 3, "shared": True},
    "sites": {"mode": "DFA", "seed": 3, "sites": ["conv2", "hidden"]},
}
TOLERANCE = bounds.HALF_OF_FLOAT64  # relative: two ranks sum in another order than one process does
STEPS = 3
WORLD = 2
largest: dict[str, float] = {}


class CNN(nn.Module):
    """Odd sizes, so that no dimension is shared out evenly; `last` is smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3)
        self.conv2 = nn.Conv2d(5, 3, 3, stride=2, padding=1)
        self.hidden = nn.Linear(27, 7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.last(torch.tanh(self.hidden(x.flatten(1))))


class Lent(CNN):
    """Its hidden layer's weight is used by the root's forward, not by the layer's own."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.last(torch.tanh(F.linear(x.flatten(1), self.hidden.weight, self.hidden.bias)))


class Wrapped(nn.Module):
    """Names its layers as DistributedDataParallel does, for the names are part of what V is drawn from."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


LAYERS = ("conv1", "conv2", "hidden", "last")
BATCH = (draw(6, 2, 7, 7, seed=11), draw(6, 1, seed=12))


def mine(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This rank's half."""
    return tuple(part.chunk(WORLD)[dist.get_rank()] for part in batch)


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grads(model: nn.Module) -> dict[str, Tensor]:
    """By the plain model's names."""
    return {
        name.removeprefix("module."): whole(p.grad).detach().clone() for name, p in model.named_parameters()
    }


def compare(what: str, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert got.keys() == want.keys(), f"{what}: {sorted(got.keys() ^ want.keys())}"
    for name in want:
        assert got[name].shape == want[name].shape, f"{what}: {name} has the shape {got[name].shape}"
        difference = ((got[name] - want[name]).norm() / want[name].norm()).item()
        largest[what] = max(largest.get(what, 0.0), difference)
        assert difference <= tolerance, f"{what}: {name} is off by {difference}"


def feedback_of(handle: Patch, prefix: str = "") -> dict[str, Tensor]:
    """V by the plain model's names. Every rank must ask: a sharded W is gathered for it."""
    return {name: handle.feedback(prefix + name) for name in LAYERS}


def compare_ranks(what: str, feedback: dict[str, Tensor]) -> None:
    """V is the same in every bit on all ranks."""
    for name, v in feedback.items():
        assert type(v) is Tensor, f"V of {name} is a {type(v).__name__}"
        others = [torch.empty_like(v) for _ in range(WORLD)]
        dist.all_gather(others, v.contiguous())
        assert all(torch.equal(v, other) for other in others), f"{what}: V of {name} differs between ranks"


def oracle_grads(
    plain: nn.Module, feedback: dict[str, Tensor], batch: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Both oracles on the whole batch; they agree."""
    found = []
    for mechanism in (swapped_saved_tensors, literal_backward_hooks):
        model = copy.deepcopy(plain)
        with mechanism(model, feedback):
            loss_of(model, batch).backward()
        found.append(grads(model))
    compare("oracles", found[0], found[1])
    return found[0]


def backprop_grads(plain: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model = copy.deepcopy(plain)
    loss_of(model, batch).backward()
    return grads(model)


def shard(model: nn.Module) -> nn.Module:
    """Two layers in groups of their own, the other two in the root's."""
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.conv2, mesh=mesh)
    fully_shard(model.hidden, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def build(
    case: str, order: str, rule: dict[str, Any], net: type[CNN] = CNN, seed: int = 0
) -> tuple[nn.Module, Patch, str]:
    """The wrapped, patched model, its patch, and what the patch's names have before the plain ones."""
    plain = redrawn(net(), seed)
    if order == "before":
        handle = patch(plain, **rule)
        return (DistributedDataParallel(plain) if case == "ddp" else shard(plain)), handle, ""
    if case == "ddp":
        model = DistributedDataParallel(plain)
        if order == "inner":
            return model, patch(model.module, **rule), ""
        return model, patch(model, **rule), "module."
    model = shard(plain)
    return model, patch(model, **rule), ""


def train(case: str, rule_name: str, order: str, folder: str, net: type[CNN] = CNN) -> None:
    """Steps of momentum SGD: gradients, weights and V after each are one process's."""
    rule = RULES[rule_name]
    model, handle, prefix = build(case, order, rule, net)
    plain = redrawn(net())  # the same weights, never patched
    single = copy.deepcopy(plain)
    lone = patch(Wrapped(single) if prefix else single, **rule)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, single)]
    drawn = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, mine(BATCH)).backward()
        loss_of(single, BATCH).backward()
        plain.load_state_dict(single.state_dict())
        v = feedback_of(lone, prefix)
        if net is CNN:
            compare("one process and oracle", grads(single), oracle_grads(plain, v, BATCH))
        exact = backprop_grads(plain, BATCH)
        for name in ("conv1.weight", "conv2.weight", "hidden.weight"):
            distance = ((grads(single)[name] - exact[name]).norm() / exact[name].norm()).item()
            assert distance > UNLIKE, f"{name} has backprop's gradient"
        compare("gradients", grads(model), grads(single))
        sharded_v = feedback_of(handle, prefix)
        compare("V", sharded_v, v)
        compare_ranks(f"step {step}", sharded_v)
        rows = handle.state_dict()["layers"].values()
        assert {row["draws"] for row in rows} == {step if rule_name == "brSF" else 0}
        drawn.append({name: u.abs() / u.norm() for name, u in sharded_v.items()})
        for optimizer in optimizers:
            optimizer.step()
        compare(
            "weights",
            {n.removeprefix("module."): whole(p.detach()) for n, p in model.named_parameters()},
            {n: p.detach() for n, p in single.named_parameters()},
        )
    for name in LAYERS[
        :3
    ]:  # magnitudes alone, since signs follow W; `last` has too few entries to move by much
        moved = (drawn[-1][name] - drawn[0][name]).norm().item()
        assert (moved > 0.3) == (rule_name == "brSF"), f"V of {name} moved by {moved}"
    rows = handle.layers
    assert all(row.calls == STEPS for row in rows)
    assert [row.rerouted for row in rows] == [0, STEPS, STEPS, STEPS]
    assert [row.kind for row in rows] == [row.kind for row in lone.layers]
    assert [row.shape for row in rows] == [row.shape for row in lone.layers]
    assert len(feedbackhook.measure(handle)) == 3 * (len(LAYERS) + 1)
    compare_measures(handle, lone)
    handle.remove()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, mine(BATCH)).backward()
    plain.load_state_dict(single.state_dict())
    compare("after remove()", grads(model), backprop_grads(plain, BATCH))


def compare_measures(handle: Patch, lone: Patch) -> None:
    for got, want in zip(feedbackhook.measure(handle), feedbackhook.measure(lone), strict=True):
        assert got[:3] == want[:3]
        assert abs(got.value - want.value) < 1e-6, f"{got} is not {want}"


def lent(case: str, rule_name: str, order: str, folder: str) -> None:
    """A weight that another module's forward uses is rerouted as in one process."""
    train(case, rule_name, order, folder, Lent)


def watch(case: str, rule_name: str, order: str, folder: str) -> None:
    """What is watched is what one process sees: with a group error angles too, which without it are of a
    rank's own samples; only rank 0 writes. Measured on the graph, with a group angles are the whole batch's,
    and the gradients stay as they are; sharded ones are refused."""
    rule = RULES[rule_name]
    model, handle, prefix = build(case, order, rule)
    single = redrawn(CNN())
    lone = patch(Wrapped(single) if prefix else single, **rule)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, single)]
    folders = [os.path.join(folder, name) for name in ("many", "one", "own")]
    group = dist.group.WORLD
    with (
        Recorder(folders[0], tensorboard=True) as many,
        Recorder(folders[1]) as one,
        Recorder(folders[2]) as own,
    ):
        handle.watch(1, many, per_sample=True, group=group)
        handle.watch(1, own, per_sample=True)
        lone.watch(1, one, per_sample=True)
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = loss_of(model, mine(BATCH))
            whole_loss = loss_of(single, BATCH)
            if case == "ddp":
                alone = feedbackhook.measure(handle, loss, per_sample=True)
                together = feedbackhook.measure(handle, loss, per_sample=True, group=group)
                wanted = feedbackhook.measure(lone, whole_loss, per_sample=True)
                angles = [row for row in alone if row.metric == "gradient_angle"]
                assert len(angles) == len(LAYERS) + 1
                assert all(math.isfinite(row.value) for row in angles)
                values = [torch.tensor([row.value for row in rows]) for rows in (together, wanted, alone)]
                torch.testing.assert_close(values[0], values[1], rtol=0, atol=bounds.ANGLE, equal_nan=True)
                assert not torch.allclose(values[2], values[1], rtol=0, atol=1e-3, equal_nan=True)
            else:
                with pytest.raises(RuntimeError, match="sharded"):
                    feedbackhook.measure(handle, loss)
            loss.backward()
            whole_loss.backward()
            compare("gradients", grads(model), grads(single))
            for optimizer in optimizers:
                optimizer.step()
    dist.barrier()
    columns = ["step", "layer", "depth", "metric"]
    got, want, local = (read(folder).set_index(columns).sort_index()["value"] for folder in folders)
    assert got.index.equals(want.index)
    assert local.index.equals(want.index)
    assert (got.isna() == want.isna()).all()
    difference = (got - want).abs().max()
    largest["watched"] = float(difference)
    assert difference < bounds.ANGLE, difference
    of_samples = got.index.get_level_values("metric").str.startswith("error_angle")
    assert (local[~of_samples] - want[~of_samples]).abs().max() < bounds.ANGLE
    for metric in ("error_angle", "error_angle_per_sample", "error_angle_samples"):
        assert (local - want).abs().xs(metric, level="metric").max() > 1e-3, metric


def static(case: str, rule_name: str, order: str, folder: str) -> None:
    """A static graph is refused in its first step, whose backward must be the first, and measured later."""
    inner = redrawn(CNN())
    handle = patch(inner, **RULES[rule_name])
    model = DistributedDataParallel(inner, static_graph=True)
    single = redrawn(CNN())
    patch(single, **RULES[rule_name])
    for step in range(2):
        for m in (model, single):
            m.zero_grad()
        loss = loss_of(model, mine(BATCH))
        if step == 0:
            with pytest.raises(RuntimeError, match="static_graph"):
                feedbackhook.measure(handle, loss)
        else:
            feedbackhook.measure(handle, loss)
        loss.backward()
        loss_of(single, BATCH).backward()
        compare("gradients of a static graph", grads(model), grads(single))


def checkpoint(case: str, rule_name: str, order: str, folder: str) -> None:
    """Saved and loaded by torch.distributed.checkpoint, V and the next gradients are the same."""
    model, handle, prefix = build(case, order, RULES[rule_name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, mine(BATCH)).backward()
        optimizer.step()
    v = feedback_of(handle, prefix)
    dcp.save({"model": get_model_state_dict(model), "feedback": handle.state_dict()}, checkpoint_id=folder)

    other = {**RULES[rule_name], "seed": 99}
    again, restored, prefix = build(case, order, other, seed=5)
    assert not torch.equal(feedback_of(restored, prefix)["hidden"], v["hidden"])
    state = {"model": get_model_state_dict(again), "feedback": restored.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state["model"])
    restored.load_state_dict(state["feedback"])
    assert restored.state_dict() == handle.state_dict()
    got = feedback_of(restored, prefix)
    assert all(torch.equal(got[name], v[name]) for name in LAYERS)
    compare_ranks("restored", got)
    for m in (model, again):
        m.zero_grad()
        loss_of(m, mine(BATCH)).backward()
    compare("gradients after restoring", grads(again), grads(model))


def direct(case: str, rule_name: str, order: str, folder: str) -> None:
    """Each rank sends the errors of its own samples, through the same B."""
    rule = RULES[rule_name]
    model, handle, prefix = build(case, order, rule)
    single = redrawn(CNN())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, single)]
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, mine(BATCH)).backward()
        b = {
            row.name.removeprefix(prefix): handle.projection(row.name)
            for row in handle.layers
            if row.rerouted
        }
        assert set(b) == {"conv2", "hidden"} | ({"last"} if rule_name != "sites" else set())
        compare_ranks("B", b)
        want = by_hooks(single, b, BATCH[0], loss=lambda output: F.mse_loss(output, BATCH[1]))
        exact = backprop_grads(single, BATCH)
        for name, p in single.named_parameters():
            p.grad = want.parameters[name]
        for name in ("conv1.weight", "conv2.weight"):
            distance = ((single.get_parameter(name).grad - exact[name]).norm() / exact[name].norm()).item()
            assert distance > UNLIKE, f"{name} has backprop's gradient"
        compare("gradients", grads(model), grads(single))
        for optimizer in optimizers:
            optimizer.step()
    handle.remove()


JOBS = {
    "direct": direct,
    "train": train,
    "lent": lent,
    "watch": watch,
    "static": static,
    "checkpoint": checkpoint,
}


def main(case: str, folder: str, jobs: Iterable[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for job in jobs:
            name, rule, order = job.split("-")
            largest.clear()
            JOBS[name](case, rule, order, os.path.join(folder, job))
            if dist.get_rank() == 0:
                print(f"passed {job}: {largest}", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    # Gloo's threads may still hold a collective's tensors while the interpreter is torn down, and then the
    # process aborts at times, with plain torch.distributed too (pytorch/pytorch#179291). Nothing is left.
    sys.stdout.flush()
    os._exit(0)
