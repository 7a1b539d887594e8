"""BatchManhattan against its formulas, written out one weight at a time in plain Python."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from feedbackhook.optim import BatchManhattan

STEPS = 20
SHAPES = [(4, 3), (5,), ()]


def sign(x: float) -> float:
    return math.copysign(1.0, x) if x != 0 else 0.0


def tau_by_hand(setting: int, g: float, w: float, memory: float, m: float, d: float) -> tuple[float, float]:
    """One weight's tau(t), and what is remembered for the next step (tau, or kappa in setting 3)."""
    if setting == 0:
        tau = -g + m * memory - d * w
        return tau, tau
    if setting == 1:
        tau = -sign(g) + m * memory - d * w
        return tau, tau
    if setting == 2:
        tau = sign(-sign(g) + m * memory - d * w)
        return tau, tau
    kappa = -sign(g) + m * memory - d * w
    return sign(kappa), kappa


def rate(step: int) -> float:
    return 0.1 if step < 8 else 0.013


def gradients(dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    """Gradients of every step and parameter; about a fifth of the entries are exactly zero."""
    generator = torch.Generator().manual_seed(3)
    draws = [[torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES] for _ in range(STEPS)]
    return [[g.where(g.abs() > 0.25, 0.0) for g in step] for step in draws]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def run(optimizer: BatchManhattan, steps: range, dtype: torch.dtype = torch.float64) -> None:
    every = gradients(dtype)
    for t in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(t)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(params, every[t], strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("setting", [0, 1, 2, 3])
@pytest.mark.parametrize(("m", "d"), [(0.9, 0.05), (0.9, 0.0), (0.0, 0.05)], ids=["m,d", "m", "d"])
def test_each_setting_follows_its_formula(setting: int, m: float, d: float) -> None:
    params = parameters()
    weights = [p.detach().flatten().tolist() for p in params]
    memory = [[0.0] * len(w) for w in weights]
    run(BatchManhattan(params, lr=rate(0), momentum=m, weight_decay=d, setting=setting), range(STEPS))
    for t, step in enumerate(gradients()):
        for k, grad in enumerate(step):
            for i, g in enumerate(grad.flatten().tolist()):
                tau, memory[k][i] = tau_by_hand(setting, g, weights[k][i], memory[k][i], m, d)
                weights[k][i] += rate(t) * tau
    for p, w in zip(params, weights, strict=True):
        assert p.dtype == torch.float64
        expected = torch.tensor(w, dtype=torch.float64)
        torch.testing.assert_close(p.detach().flatten(), expected, rtol=1e-12, atol=1e-12)


def test_setting_0_is_torch_sgd() -> None:
    ours, theirs = parameters(), parameters()
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    run(BatchManhattan(ours, lr=0.1, momentum=0.9, weight_decay=0.01, setting=0), range(STEPS))
    run(sgd, range(STEPS))  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_moves_nothing_without_momentum_and_decay() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    p.grad = torch.tensor([0.0, -0.0, 5.0])
    BatchManhattan([p], lr=0.5, momentum=0.0).step()
    assert p.tolist() == [1.0, -2.0, -0.5]


def test_the_gradient_is_left_as_it_is() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([0.5, 0.0, -2.0])
    BatchManhattan([p], lr=0.5, setting=3).step()
    assert p.grad.tolist() == [0.5, 0.0, -2.0]


def test_groups_have_their_own_options() -> None:
    a, b, c = (nn.Parameter(torch.tensor([1.0])) for _ in range(3))
    groups: list[dict[str, object]] = [{"params": [a]}, {"params": [b], "setting": 0, "lr": 0.5}]
    optimizer = BatchManhattan(groups, lr=0.1, momentum=0.0)
    optimizer.add_param_group({"params": [c], "weight_decay": 2.0})
    for p in (a, b, c):
        p.grad = torch.tensor([3.0])
    optimizer.step()
    torch.testing.assert_close(torch.cat([a, b, c]).detach(), torch.tensor([1 - 0.1, 1 - 1.5, 1 - 0.1 * 3]))


def test_parameters_of_two_dtypes_in_one_group() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    for p in (a, b):
        p.grad = torch.full_like(p, 7.0)
    BatchManhattan([a, b], lr=0.25).step()
    assert (a.tolist(), b.tolist()) == ([0.75, 0.75], [0.75, 0.75])
    assert (a.dtype, b.dtype) == (torch.float32, torch.float64)


def test_a_parameter_without_gradient_is_skipped_until_it_has_one() -> None:
    moving, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = BatchManhattan([moving, still], lr=0.5, weight_decay=0.5)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert still not in optimizer.state
    still.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [0.25, 0.25]


def test_a_step_before_any_gradient_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    BatchManhattan([p], lr=0.5, weight_decay=0.5).step()
    assert p.tolist() == [1.0, 1.0]


def test_the_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = BatchManhattan([p], lr=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * 3).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    assert p.item() == 1.5


@pytest.mark.parametrize("setting", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_state_continues_bit_equal(setting: int, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    run(BatchManhattan(whole, lr=1.0, weight_decay=0.05, setting=setting), range(STEPS), dtype)

    first = parameters(dtype)
    optimizer = BatchManhattan(first, lr=1.0, weight_decay=0.05, setting=setting)
    run(optimizer, range(11), dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    resumed = BatchManhattan(second, lr=7.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, range(11, STEPS), dtype)
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)


def test_a_learning_rate_schedule_of_torch_drives_it() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = BatchManhattan([p], lr=1.0, momentum=0.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.25)
    for _ in range(2):
        p.grad = torch.full((1,), -9.0)
        optimizer.step()
        schedule.step()
    assert p.item() == 1.25


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"lr": 0.0}, ValueError, "lr must be a positive number, not 0.0"),
        ({"lr": -1}, ValueError, "lr must be"),
        ({"lr": math.inf}, ValueError, "lr must be"),
        ({"lr": "fast"}, TypeError, "lr must be a positive number, not 'fast'"),
        ({"lr": True}, TypeError, "lr must be"),
        ({"lr": 0.1, "momentum": 1.0}, ValueError, "momentum must be"),
        ({"lr": 0.1, "momentum": None}, TypeError, "momentum must be"),
        ({"lr": 0.1, "weight_decay": -1e-4}, ValueError, "weight_decay must be"),
        ({"lr": 0.1, "setting": 4}, ValueError, r"setting must be one of \(0, 1, 2, 3\), not 4"),
        ({"lr": 0.1, "setting": 1.0}, TypeError, "setting must be one of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options: dict[str, object], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        BatchManhattan([nn.Parameter(torch.ones(1))], **options)  # type: ignore[arg-type]


def test_bad_options_of_a_group_are_named() -> None:
    optimizer = BatchManhattan([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="setting must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "setting": 9})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        BatchManhattan(embedding.parameters(), lr=0.1).step()
    assert torch.equal(embedding.weight, before)
