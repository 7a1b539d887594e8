"""Counter-based draws: uniform, independent, and the same wherever and whenever they are made."""

import pytest
import torch
from scipy import stats

import feedbackhook.rng
from feedbackhook import CounterRNG, LayerInfo

LAYER = LayerInfo("block.fc", "Linear", (1000, 1000), 1000)
WEIGHT = torch.empty(LAYER.shape)


def hash_by_definition(n: int, first: int, second: int) -> list[int]:
    """The documented hash, in Python integers, one index at a time."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    return [mix(mix(index ^ first) ^ second) for index in range(n)]


@pytest.mark.parametrize("block", [7, 64, 1 << 18], ids=lambda block: f"block{block}")
def test_the_tensor_hash_is_the_documented_hash(monkeypatch, block):
    monkeypatch.setattr(feedbackhook.rng, "_BLOCK", block)
    first, second = 0x9E3779B9, 0xDEADBEEF
    bits = feedbackhook.rng._hash(200, first, second, torch.device("cpu"))
    assert [value % 2**32 for value in bits.tolist()] == hash_by_definition(200, first, second)


def test_uniform_draws_are_uniform():
    draws = CounterRNG(0, LAYER).uniform(WEIGHT)
    assert draws.shape == WEIGHT.shape
    assert draws.dtype == torch.float32
    assert draws.min() > 0
    assert draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3


def test_normal_draws_are_normal_and_finite():
    draws = CounterRNG(0, LAYER).normal(WEIGHT)
    assert torch.isfinite(draws).all()
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 1000, 1 << 16])
def test_draws_at_a_distance_are_uncorrelated(lag):
    draws = CounterRNG(0, LAYER).uniform(WEIGHT).flatten().double()
    correlation = torch.corrcoef(torch.stack([draws[:-lag], draws[lag:]]))[0, 1]
    assert abs(correlation) < 4 / draws.numel() ** 0.5


OTHERS = {
    "another seed": CounterRNG(1, LAYER),
    "another layer": CounterRNG(0, LayerInfo("block.fc2", "Linear", LAYER.shape, 1000)),
    "another count": CounterRNG(0, LAYER, 1),
    "a far count": CounterRNG(0, LAYER, 1 << 16),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_draws_under_different_keys_are_uncorrelated(other):
    a, b = (rng.uniform(WEIGHT).flatten().double() for rng in (CounterRNG(0, LAYER), other))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / a.numel() ** 0.5


def test_streams_of_one_draw_are_uncorrelated():
    rng = CounterRNG(0, LAYER)
    a, b = (rng.uniform(WEIGHT, stream).flatten().double() for stream in ("magnitude", "sign"))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / a.numel() ** 0.5


def test_a_draw_can_be_made_again_and_disturbs_no_generator():
    before = torch.get_rng_state()
    first, again = (CounterRNG(3, LAYER, 5).uniform(WEIGHT) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [0, 1, 77, 2**31, 2**32 - 1])
def test_a_count_in_a_tensor_draws_what_the_int_draws(count):
    as_int, as_tensor = (CounterRNG(3, LAYER, c).uniform(WEIGHT) for c in (count, torch.tensor(count)))
    assert torch.equal(as_int, as_tensor)


def test_an_empty_weight_is_no_trouble():
    assert CounterRNG(0, LAYER).normal(torch.empty(0, 3)).shape == (0, 3)
