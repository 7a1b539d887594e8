"""The quantities of a diagnosis, each against a value worked out by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from support import bounds
from support.problems import draw
from torch import Tensor, nn

from feedbackhook.diagnosis.credit import credit
from feedbackhook.diagnosis.floor import Floor
from feedbackhook.diagnosis.growth import observe_growth
from feedbackhook.diagnosis.quantities import Gram, Moments

CLOSE = {"rel": bounds.HALF_OF_FLOAT64, "abs": bounds.HALF_OF_FLOAT64}


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.hypot(*a) / math.hypot(*b)


def as_layers(vectors: list[list[float]]) -> list[list[Tensor]]:
    """Each gradient in two parameters, as of a weight and a scale."""
    return [[torch.tensor(v[:2]).double(), torch.tensor(v[2:]).double().reshape(1, -1)] for v in vectors]


EXACT = [[1.0, 2.0, 0.5, 0.0], [1.5, 1.0, 0.0, 0.5], [0.5, 2.5, 1.0, -0.5]]
DELIVERED = [[5.0, 1.0, -2.0, 0.3], [4.0, 2.0, -1.0, 0.2], [6.0, 1.0, -2.5, -0.4]]


def test_moments_over_batches_by_hand():
    found = Moments.of(Gram.of(as_layers(DELIVERED), as_layers(EXACT)))
    ordered = list(itertools.permutations(range(3), 2))
    a = statistics.fmean(dot(EXACT[i], EXACT[j]) for i, j in ordered)
    b = statistics.fmean(dot(DELIVERED[i], EXACT[j]) for i, j in ordered)
    c = statistics.fmean(dot(DELIVERED[i], DELIVERED[j]) for i, j in ordered)
    variance = statistics.fmean(dot(g, g) for g in DELIVERED) - c
    exact_variance = statistics.fmean(dot(g, g) for g in EXACT) - a
    pairs = list(itertools.combinations(range(3), 2))
    assert found.stability == pytest.approx(
        statistics.fmean(cosine(DELIVERED[i], DELIVERED[j]) for i, j in pairs), **CLOSE
    )
    assert found.exact_stability == pytest.approx(
        statistics.fmean(cosine(EXACT[i], EXACT[j]) for i, j in pairs), **CLOSE
    )
    assert found.pairs == 3
    assert found.bias == pytest.approx(math.sqrt((c - 2 * b + a) / a), **CLOSE)
    assert found.noise == pytest.approx(math.sqrt(variance / a), **CLOSE)
    assert found.exact_noise == pytest.approx(math.sqrt(exact_variance / a), **CLOSE)
    assert math.isnan(found.draw_noise)
    assert found.signal_to_noise == pytest.approx(b / math.sqrt(a) / math.sqrt(variance), **CLOSE)
    assert found.exact_signal_to_noise == pytest.approx(math.sqrt(a / exact_variance), **CLOSE)
    parts = [
        statistics.fmean(dot(DELIVERED[i], EXACT[j]) for j in range(3) if j != i) / math.sqrt(a)
        for i in range(3)
    ]
    error = statistics.stdev(parts) / math.sqrt(3)
    assert found.uncertainty == pytest.approx(2 * error / math.sqrt(variance), **CLOSE)


def test_the_variance_is_the_unbiased_one_of_statistics():
    """The mean squared distance to the mean, with n - 1, summed over entries."""
    found = Moments.of(Gram.of(as_layers(DELIVERED), as_layers(EXACT)))
    a = statistics.fmean(dot(EXACT[i], EXACT[j]) for i, j in itertools.permutations(range(3), 2))
    by_entry = math.fsum(statistics.variance(entry) for entry in zip(*DELIVERED, strict=True))
    assert found.noise**2 * a == pytest.approx(by_entry, **CLOSE)


def test_exact_gradients_have_no_bias_and_the_exact_signal():
    found = Moments.of(Gram.of(as_layers(EXACT), as_layers(EXACT)))
    assert found.bias == pytest.approx(
        0, abs=math.sqrt(8 * bounds.ROUNDING["float64"])
    )  # a root of what cancels
    assert found.stability == found.exact_stability
    assert found.signal_to_noise == pytest.approx(found.exact_signal_to_noise, **CLOSE)
    assert found.uncertainty == pytest.approx(found.exact_uncertainty, **CLOSE)


def test_draws_are_told_from_batches():
    """Two batches and three draws: pairs differ in both, and the draws' part is that within a batch."""
    draws = [[[float(1 + b + d), float(b - d), float(b * d), 1.0] for b in range(2)] for d in range(3)]
    samples = [g for of_draw in draws for g in of_draw]
    found = Moments.of(Gram.of(as_layers(samples), as_layers(EXACT[:2])))
    a = dot(EXACT[0], EXACT[1])
    places = [(d, b) for d in range(3) for b in range(2)]
    apart = [(i, j) for i, j in itertools.permutations(places, 2) if i[0] != j[0] and i[1] != j[1]]
    within = [(i, j) for i, j in itertools.permutations(places, 2) if i[0] != j[0] and i[1] == j[1]]

    def at(place: tuple[int, int]) -> list[float]:
        return draws[place[0]][place[1]]

    squares = statistics.fmean(dot(g, g) for g in samples)
    c = statistics.fmean(dot(at(i), at(j)) for i, j in apart)
    again = statistics.fmean(dot(at(i), at(j)) for i, j in within)
    assert found.noise == pytest.approx(math.sqrt((squares - c) / a), **CLOSE)
    assert found.draw_noise == pytest.approx(math.sqrt((squares - again) / a), **CLOSE)
    assert found.stability == pytest.approx(statistics.fmean(cosine(at(i), at(j)) for i, j in apart), **CLOSE)


def test_one_batch_and_opposed_exact_gradients_leave_moments_undefined():
    one = Moments.of(Gram.of(as_layers(DELIVERED[:1]), as_layers(EXACT[:1])))
    assert one.pairs == 0
    assert all(math.isnan(value) for value in one if not isinstance(value, int))
    opposed = [EXACT[0], [-x for x in EXACT[0]]]
    undefined = Moments.of(Gram.of(as_layers(DELIVERED[:2]), as_layers(opposed)))
    assert undefined.exact_stability == pytest.approx(-1)
    assert math.isnan(undefined.signal_to_noise)


def test_large_gradients_are_summed_in_blocks():
    a, b = draw(3, 70_001), draw(3, 70_001, seed=1)
    found = Gram.of([[row] for row in a], [[row] for row in b])
    assert found.entries == 70_001
    for got, want in ((found.delivered, a @ a.T), (found.crossed, a @ b.T), (found.exact, b @ b.T)):
        torch.testing.assert_close(got, want)


def test_credit_of_a_quadratic_loss_is_the_cosine():
    """For L = |W x|^2 / 2 the third derivative is zero, so the central difference is h <gradient, d>."""
    weight, x = draw(3, 4), draw(4, 7, seed=1)
    gradient, other = weight @ x @ x.T, draw(3, 4, seed=2)
    before = weight.clone()
    found = credit(lambda: float((weight @ x).square().sum() / 2), [weight], [other], [gradient])
    length = float(weight.norm()) * torch.finfo(torch.float64).eps ** (1 / 3)
    assert found.exact == pytest.approx(length * float(gradient.norm()), rel=bounds.HALF_OF_FLOAT64)
    want = float((gradient * other).sum() / gradient.norm() / other.norm())
    assert found.ratio == pytest.approx(want, abs=2 * found.uncertainty + bounds.HALF_OF_FLOAT64)
    assert torch.equal(weight, before)
    same = credit(lambda: float((weight @ x).square().sum() / 2), [weight], [3 * gradient], [gradient])
    assert same.ratio == pytest.approx(1, abs=4 * same.uncertainty)


def test_credit_within_rounding_errors_is_undefined_and_errors_restore_the_weight():
    weight = draw(3, 4)
    before, version = weight.clone(), weight._version
    found = credit(lambda: 1e6, [weight], [draw(3, 4, seed=2)], [draw(3, 4, seed=3)])
    assert math.isnan(found.ratio)
    assert math.isnan(credit(lambda: 1.0, [weight], [draw(3, 4)], [torch.zeros(3, 4)]).ratio)
    with pytest.raises(ZeroDivisionError):
        credit(lambda: 1 / 0, [weight], [draw(3, 4)], [draw(3, 4)])
    assert torch.equal(weight, before)
    assert weight._version == version


def test_growth_is_of_outputs_to_inputs_and_of_what_comes_in_between():
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity())
            self.last = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(1000 * self.inner(x))

    model = Between().double()
    with torch.no_grad():
        model.inner[0].weight.copy_(3 * torch.eye(4))
    with observe_growth(model) as growth:
        model(draw(5, 4))
    assert growth.ratios["inner.0"] == pytest.approx(3)
    assert growth.ratios["inner"] == pytest.approx(3)
    assert growth.ratios["inner.1"] == pytest.approx(1)
    assert growth.ratios["last"] == pytest.approx(1000)
    assert growth.largest() == (pytest.approx(1000), "last")
    assert growth.within("inner.0")[0] == pytest.approx(3)
    assert growth.unit == torch.finfo(torch.float64).eps
    with observe_growth(model) as infinite, torch.no_grad():
        model.inner[0].weight.fill_(math.inf)
        model(draw(5, 4))
    assert infinite.ratios["inner.0"] == math.inf
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("floor", "reason"),
    [
        (Floor(1.0, 0.5, 0.25), None),
        (Floor(0.4, 0.5, 0.25), "a step of that length"),
        (Floor(0.4, 0.2, 0.5), "rounding errors of its own sum"),
        (Floor(0.0, 0.2, 0.5), "is zero"),
        (Floor(math.inf, 0.2, 0.5), "not finite"),
        (Floor(1.0, 0.0, 0.0), None),
    ],
)
def test_a_floor_says_why(floor, reason):
    assert floor.reason is None if reason is None else reason in floor.reason
    if floor.step:
        assert floor.ratio == floor.gradient / max(floor.step, floor.total)
