"""Counter-based draws: uniform, independent, and the same wherever and whenever they are made.

Draws are fixed by their seeds, so each test passes always or never. If the numbers were random, some test
would fail for less than two seeds in a thousand: the bounds are 4.9 standard deviations, which a normal
number exceeds with probability 1e-6, for about 1,300 correlations and shares; the p-values of about 15 other
tests are bounded by 1e-5, and the largest of many correlations by 1e-4.
"""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import feedbackhook.rng
from feedbackhook import CounterRNG, LayerInfo
from feedbackhook.rules import make_rule

LAYER = LayerInfo("block.fc", "Linear", (1000, 1000), 1000)
WEIGHT = torch.empty(LAYER.shape)
BOUND = stats.norm.isf(0.5e-6)  # in standard deviations
METHODS = pytest.mark.parametrize("method", ["uniform", "uniform16"])


def word(index: int, first: int = 0, second: int = 0, third: int = 0) -> int:
    x = index ^ first
    x = ((x ^ (x >> 17)) * 0xED5AD4BB + second) % 2**32
    x = ((x ^ (x >> 11)) * 0xAC4C1B51 + third) % 2**32
    x = ((x ^ (x >> 15)) * 0x31848BAB) % 2**32
    return x ^ (x >> 14)


def by_definition(method: str, n: int, seed: int, layer: str, count: int, stream: str) -> list[float]:
    """The documented numbers, in Python integers, one index at a time."""
    digest = hashlib.blake2b(f"{seed}\0{layer}\0{stream}".encode(), digest_size=12).digest()
    mixed, (first, second, third) = word(count % 2**32), map(int, np.frombuffer(digest, "<u4"))
    keys = first ^ mixed, second ^ mixed, (third + mixed) % 2**32
    words = [word(index, *keys) for index in range(n)]
    if method == "uniform":
        bits, values = 23, [w >> 9 for w in words]
    else:
        bits, values = 16, [half for w in words for half in (w % 2**16, w >> 16)][:n]
    signed = [value - 2**bits if value >= 2 ** (bits - 1) else value for value in values]
    return [(value + 2 ** (bits - 1) + 0.5) / 2**bits for value in signed]


def bits_of(draws: torch.Tensor, bits: int = 16) -> np.ndarray:
    """The highest bits of numbers from U(0, 1), as integers."""
    return (draws.flatten().double() * 2**bits).long().numpy()


def assert_bits_agree_by_chance(a: np.ndarray, b: np.ndarray) -> None:
    for bit in range(16):
        share = (((a ^ b) >> bit) & 1).mean()
        assert abs(share - 0.5) < BOUND * 0.5 / len(a) ** 0.5, bit


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    correlation = torch.corrcoef(torch.stack([a, b]).double())[0, 1]
    assert abs(correlation) < BOUND / a.numel() ** 0.5


@METHODS
@pytest.mark.parametrize("block", [8, 64, 1 << 17], ids=lambda block: f"block{block}")
@pytest.mark.parametrize("n", [1, 2, 63, 200])
def test_draws_are_the_documented_numbers(monkeypatch, block, n, method):
    monkeypatch.setattr(feedbackhook.rng, "_BLOCK", block)
    for count in (0, 5, 2**32 + 7):
        draws = getattr(CounterRNG(-3, LAYER, count), method)(torch.empty(n), "sign")
        assert draws.tolist() == by_definition(method, n, -3, LAYER.name, count, "sign")


@METHODS
def test_uniform_draws_are_uniform(method):
    draws = getattr(CounterRNG(0, LAYER), method)(WEIGHT)
    assert draws.shape == WEIGHT.shape
    assert draws.dtype == torch.float32
    assert draws.min() > 0
    assert draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-5


@METHODS
@pytest.mark.parametrize("position", ["high", "low"])
def test_high_and_low_bits_are_equidistributed(method, position):
    """Neither too unevenly nor too evenly."""
    draws = getattr(CounterRNG(0, LAYER), method)(WEIGHT)
    bits = bits_of(draws, 23 if method == "uniform" else 16)
    values = bits % 256 if position == "low" else bits >> (bits.max().item().bit_length() - 8)
    p = stats.chisquare(np.bincount(values, minlength=256)).pvalue
    assert 1e-5 < p < 1 - 1e-5


@pytest.mark.parametrize("lag", [1, 2, 3, 1000])
@pytest.mark.parametrize("position", ["high", "low"])
def test_pairs_of_draws_are_equidistributed(lag, position):
    """Of the halves of a word (1, at even indices), of words that follow each other, and of others."""
    bits = bits_of(CounterRNG(0, LAYER).uniform16(WEIGHT))
    values = bits % 64 if position == "low" else bits >> 10
    first = np.arange(0, len(values) - lag - 1, 2 * lag)  # pairs that do not overlap
    pairs = np.concatenate([values[first + i] * 64 + values[first + i + lag] for i in range(min(lag, 2))])
    assert 1e-5 < stats.chisquare(np.bincount(pairs, minlength=4096)).pvalue < 1 - 1e-5


def test_normal_draws_are_normal_and_finite():
    draws = CounterRNG(0, LAYER).normal(WEIGHT)
    assert torch.isfinite(draws).all()
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


@METHODS
@pytest.mark.parametrize("lag", [1, 2, 3, 1000, 1 << 17, 1 << 18])
def test_draws_at_a_distance_are_uncorrelated(lag, method):
    draws = getattr(CounterRNG(0, LAYER), method)(WEIGHT).flatten()
    assert_uncorrelated(draws[:-lag], draws[lag:])
    bits = bits_of(draws)
    assert_bits_agree_by_chance(bits[:-lag], bits[lag:])


OTHERS = {
    "the next seed": CounterRNG(1, LAYER),
    "the seed before": CounterRNG(-1, LAYER),
    "a far seed": CounterRNG(1 << 40, LAYER),
    "another layer": CounterRNG(0, LayerInfo("block.fc2", "Linear", LAYER.shape, 1000)),
    "the next count": CounterRNG(0, LAYER, 1),
    "a far count": CounterRNG(0, LAYER, 1 << 16),
}


@METHODS
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_draws_under_different_keys_are_independent(other, method):
    a, b = (getattr(rng, method)(WEIGHT).flatten() for rng in (CounterRNG(0, LAYER), other))
    assert_uncorrelated(a, b)
    assert_bits_agree_by_chance(bits_of(a), bits_of(b))


@METHODS
def test_streams_of_one_draw_are_independent(method):
    a, b = (getattr(CounterRNG(0, LAYER), method)(WEIGHT, s).flatten() for s in ("magnitude", "sign"))
    assert_uncorrelated(a, b)
    assert_bits_agree_by_chance(bits_of(a), bits_of(b))


def test_many_layers_and_redraws_are_uncorrelated():
    """All 3,160 pairs of 20 layers with 4 draws each, also with one of the two shifted by one word."""
    n = 1 << 13
    layers = [LayerInfo(f"blocks.{number}", "Linear", (n,), n) for number in range(20)]
    draws = torch.stack(
        [CounterRNG(0, each, count).uniform16(torch.empty(n)) for each in layers for count in range(4)]
    )
    bound = stats.norm.isf(0.5e-4 / 6400) / n**0.5
    assert torch.corrcoef(draws.double()).triu(1).abs().max() < bound
    shifted = torch.corrcoef(torch.cat([draws[:, 2:], draws[:, :-2]]).double())[: len(draws), len(draws) :]
    assert shifted.abs().max() < bound


def test_a_bit_of_seed_or_count_changes_half_of_all_bits():
    """Avalanche: for each bit of the count, for those of small seeds, and for a letter of the name."""
    n = 1 << 13
    start = bits_of(CounterRNG(6, LAYER, 9).uniform16(torch.empty(n)))
    renamed = LayerInfo("block.fd", "Linear", LAYER.shape, 1000)
    changed = [CounterRNG(6, LAYER, 9 ^ (1 << bit)) for bit in range(32)]
    changed += [*(CounterRNG(6 ^ (1 << bit), LAYER, 9) for bit in range(10)), CounterRNG(6, renamed, 9)]
    for rng in changed:
        assert_bits_agree_by_chance(start, bits_of(rng.uniform16(torch.empty(n))))


def test_draws_that_share_keys_are_uncorrelated():
    """One in thousands of pairs of draws has nearly the same first key."""
    index = torch.arange(1 << 17, dtype=torch.int32)
    keys = (7, 12345, 987)
    first = feedbackhook.rng._numbers(index, keys, True)
    for place, other in itertools.product(range(3), (0x1D2C5680, -0x61C88647, 77, 7 + (1 << 30))):
        others = [*keys[:place], other, *keys[place + 1 :]]
        assert_uncorrelated(first, feedbackhook.rng._numbers(index, others, True))


def test_every_share_is_met_within_half_a_step_of_16_bits():
    """Of the values that a number can have, exactly, and with them the concordance of V."""
    values = set(CounterRNG(0, LAYER).uniform16(torch.empty(1 << 21)).tolist())
    grid = (np.arange(1 << 16) + 0.5) / (1 << 16)
    assert values == set(grid.tolist())
    for concordance in (0.0, 1e-5, 0.1, 0.5, 0.8, 1 - 1e-5, 1 - 2**-17):
        found = (torch.tensor(grid).float() - (1 - concordance) >= 0).double().mean()
        assert abs(float(found) - concordance) <= 2**-17


def test_magnitudes_stay_and_signs_are_nested_when_the_concordance_changes():
    weight = torch.ones(1000, 200)
    rng = CounterRNG(0, LayerInfo("fc", "Linear", (1000, 200), 200))
    drawn = [
        make_rule("sign", {"concordance": c}).draw(weight, rng)["M o S"] for c in (1.0, 0.9, 0.5, 0.1, 0.0)
    ]
    assert all(torch.equal(each.abs(), drawn[0]) for each in drawn)
    assert all(bool((a >= b).all()) for a, b in itertools.pairwise(drawn))
    for c, each in zip((1.0, 0.9, 0.5, 0.1, 0.0), drawn, strict=True):
        n = each.numel()
        assert abs((each > 0).double().mean() - c) <= 2**-17 + BOUND * (c * (1 - c) / n) ** 0.5
        signs = torch.where(each > 0, 1.0, -1.0).flatten()
        if 0 < c < 1:
            assert_uncorrelated(signs, each.abs().flatten())


def test_a_draw_can_be_made_again_and_disturbs_no_generator():
    before = torch.get_rng_state()
    first, again = (CounterRNG(3, LAYER, 5).uniform(WEIGHT) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


@METHODS
@pytest.mark.parametrize("count", [0, 1, 77, 2**31, 2**32 - 1])
def test_a_count_in_a_tensor_draws_what_the_int_draws(count, method):
    as_int, as_tensor = (
        getattr(CounterRNG(3, LAYER, c), method)(WEIGHT) for c in (count, torch.tensor(count))
    )
    assert torch.equal(as_int, as_tensor)


def test_an_empty_weight_is_no_trouble():
    assert CounterRNG(0, LAYER).normal(torch.empty(0, 3)).shape == (0, 3)
