"""What is measured and watched on a GPU equals what the CPU measures."""

from __future__ import annotations

import copy

import pytest
import torch
from support import bounds
from support.gpu import DEVICE, feedback_of, home, moved
from support.oracle import by_backprop, by_saved_tensors, gradients, probe, read_gradients
from support.problems import Net, draw, mlp, random_feedback, redrawn

import feedbackhook
from feedbackhook import Recorder, read


def is_close(metric: str, value: float):
    if "angle" in metric:
        return pytest.approx(value, abs=bounds.ANGLE, nan_ok=True)
    return pytest.approx(value, rel=bounds.HALF_OF_FLOAT64, nan_ok=True)


@pytest.mark.parametrize("mode", ["symmetric", "tensor", "sign", "brSF"])
def test_what_is_measured_is_what_the_cpu_measures(mode):
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    found = {}
    for device in ("cpu", DEVICE):
        options = {"feedback": random_feedback(plain)} if mode == "tensor" else {}
        model = copy.deepcopy(plain).to(device)
        patch = feedbackhook.patch(model, mode, **options)
        loss = probe(model(x.to(device).requires_grad_()))
        found[device] = feedbackhook.measure(patch, loss, per_sample=True)
        loss.backward()
        got = home(read_gradients(model, x, loss.reshape(1)))
        want = (
            by_backprop(plain, x) if mode == "symmetric" else by_saved_tensors(plain, feedback_of(patch), x)
        )
        for name, grad in want.parameters.items():  # measuring leaves graph and gradients as they were
            assert (got.parameters[name] - grad).norm() <= bounds.HALF_OF_FLOAT64 * grad.norm()
    assert len(found["cpu"]) == len(found[DEVICE]) > 0
    for ours, theirs in zip(found[DEVICE], found["cpu"], strict=True):
        assert ours[:3] == theirs[:3]
        assert ours.value == is_close(ours.metric, theirs.value), ours


@pytest.mark.parametrize("mode", ["sign", "brSF"])
def test_what_is_watched_is_what_the_cpu_watches(mode, tmp_path):
    plain, x = redrawn(Net()), draw(3, 2, 9, 9)
    tables, weights = [], []
    for name, device in (("cpu", "cpu"), ("device", DEVICE), ("unwatched", DEVICE)):
        model = copy.deepcopy(plain).to(device)
        patch = feedbackhook.patch(model, mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        with Recorder(tmp_path / name) as recorder:
            if name != "unwatched":
                patch.watch(2, recorder, per_sample=True)
            for _ in range(5):
                optimizer.zero_grad()
                probe(model(x.to(device))).backward()
                optimizer.step()
        weights.append({key: value.cpu() for key, value in model.state_dict().items()})
        if name != "unwatched":
            keys = ["step", "layer", "depth", "metric"]
            tables.append(read(tmp_path / name).set_index(keys)["value"].sort_index())
    on_cpu, on_device = tables
    assert len(on_cpu) > 0
    assert on_device.index.equals(on_cpu.index)
    for key, ours, theirs in zip(on_cpu.index, on_device, on_cpu, strict=True):
        assert ours == is_close(key[-1], theirs), key
    for watched, unwatched in zip(weights[1].values(), weights[2].values(), strict=True):
        assert (watched - unwatched).norm() <= bounds.HALF_OF_FLOAT64 * unwatched.norm()


def test_error_signals_are_shown_as_they_arrive():
    model, patch = moved(mlp())
    seen = []
    patch.on_error_signal("2", lambda *signals: seen.append(signals))
    gradients(model, draw(3, 4).to(DEVICE))
    ((grad_input, grad_output),) = seen
    want = grad_output @ patch.feedback("2")
    assert (grad_input - want).norm() <= bounds.HALF_OF_FLOAT64 * want.norm()
