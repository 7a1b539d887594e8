"""Direct feedback in training: mixed precision, accumulation, dropout, learning, compiled code."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.direct import by_hooks, matrices_of
from support.oracle import assert_same_gradients, gradients, probe
from support.problems import CNN_INPUT, Net, draw, mlp, redrawn
from torch import Tensor, nn

import feedbackhook

WHERE = {"layers": {}, "blocks": {"sites": "blocks[.].*"}}
everywhere = pytest.mark.parametrize("options", WHERE.values(), ids=WHERE)


@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_sends_what_is_sent_without_it(options, dtype):
    """The same B, within the roundings of the smaller dtype."""

    def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=getattr(torch, dtype)):
            return model(x).float()

    model, x = redrawn(Net()).float(), draw(*CNN_INPUT).float()
    patch = feedbackhook.patch(model, "DFA", **options)
    plain = gradients(model, x)
    before = matrices_of(patch)
    mixed = gradients(model, x, under_autocast)
    after = matrices_of(patch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    bound = bounds.of_autocast(6, dtype)
    for name, p in plain.parameters.items():
        assert mixed.parameters[name].dtype == torch.float32
        assert (mixed.parameters[name] - p).norm() <= bound * p.norm(), name


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(options, dtype):
    model = redrawn(Net()).to(dtype)
    patch = feedbackhook.patch(model, "DFA", **options)
    got = gradients(model, draw(*CNN_INPUT).to(dtype))
    assert all(b.dtype == dtype for b in matrices_of(patch).values())
    assert all(g.isfinite().all() and g.dtype == dtype for g in got.parameters.values())


@everywhere
def test_accumulated_steps_are_those_of_a_large_batch(options):
    x, y = draw(4, 2, 9, 9), torch.tensor([0, 1, 2, 3])
    found = []
    for parts in (1, 2):
        model = redrawn(Net())
        feedbackhook.patch(model, "DFA", **options)
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(x_part), y_part) / parts).backward()
        found.append([p.grad for p in model.parameters()])
    for whole, accumulated in zip(*found, strict=True):
        assert (whole - accumulated).norm() <= bounds.HALF_OF_FLOAT64 * whole.norm()


@everywhere
def test_batches_of_other_sizes_and_images_of_other_sizes(options):
    plain, model = redrawn(Net()), redrawn(Net())
    patch = feedbackhook.patch(model, "DFA", **options)
    for shape in (CNN_INPUT, (3, 2, 9, 9), (1, 2, 11, 9), CNN_INPUT):
        x = draw(*shape)
        got = gradients(model, x)
        assert_same_gradients(got, by_hooks(plain, matrices_of(patch), x))


@pytest.mark.parametrize(("mode", "lr"), [("DFA", 0.1), ("sDFA", 0.003), ("DRTP", 0.001)])
def test_each_rule_learns_what_a_last_layer_alone_does_not(mode, lr):
    """Two spirals: no line through random features separates them as well. What is learned depends on B, so
    the median of five draws counts."""
    t = torch.linspace(0.3, 2, 100, dtype=torch.float64)
    arm = torch.stack([t * torch.cos(3 * t), t * torch.sin(3 * t)], 1)
    x, y = torch.cat([arm, -arm]), torch.arange(2).repeat_interleave(100)

    def trained(model: nn.Module, parameters, patch=None) -> float:
        optimizer = torch.optim.SGD(parameters, lr, momentum=0.9)
        for _ in range(600):
            optimizer.zero_grad()
            if mode == "DRTP" and patch is not None:
                patch.targets(y)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return F.cross_entropy(model(x), y).item()

    start = redrawn(
        nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    )
    shallow = copy.deepcopy(start)
    last = trained(shallow, shallow[4].parameters())
    found = []
    for seed in range(5):
        model = copy.deepcopy(start)
        patch = feedbackhook.patch(model, mode, seed=seed)
        found.append(trained(model, model.parameters(), patch))
    assert statistics.median(found) < 0.8 * last


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("options", [{}, {"sites": ["2"]}], ids=["layers", "blocks"])
def test_compiled_code_is_refused_by_name_and_works_again_without(options, fullgraph):
    plain, model, x = mlp(), mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "DFA", **options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(RuntimeError, match="uncompiled"):
        probe(compiled(x.clone().requires_grad_())).backward()
    assert torch._C._len_torch_function_stack() == 0
    model.zero_grad()
    assert_same_gradients(gradients(model, x), by_hooks(plain, matrices_of(patch), x))


@pytest.mark.parametrize(("unit", "stops"), [(nn.ReLU, False), (nn.Tanh, True)], ids=["ReLU", "tanh"])
def test_drtp_stops_only_where_units_saturate(unit, stops):
    """B y does not become smaller as the loss does: see docs/rules.md."""
    model = redrawn(nn.Sequential(nn.Linear(10, 30), unit(), nn.Linear(30, 30), unit(), nn.Linear(30, 3)))
    y = torch.arange(60) % 3
    x = draw(60, 10)
    x[:, :3] += 3 * F.one_hot(y, 3)
    patch = feedbackhook.patch(model, "DRTP")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, steps = [], []
    for _ in range(200):
        before = model[2].weight.detach().clone()
        optimizer.zero_grad()
        patch.targets(y)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        steps.append((model[2].weight.detach() - before).norm().item())
    assert losses[-1] < losses[0] / 5  # both learn this task
    assert (steps[-1] < steps[0]) == stops
