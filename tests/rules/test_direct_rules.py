"""The formulas of the direct rules: the distribution of B, and what B multiplies."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.bounds import of_mean
from support.problems import draw

from feedbackhook import CounterRNG, LayerInfo
from feedbackhook.core.projection import Attention, Fit, Place, Projection, Use, fit
from feedbackhook.rules import describe, is_direct, make_rule, rule_values

D, K = 400, 100
INFO = LayerInfo("fc", "Linear", (7, D), D)
RNG = CounterRNG(0, INFO)
TEMPLATE = torch.empty(D, K, dtype=torch.float64)
MODES = ("DFA", "sDFA", "DRTP")


@pytest.mark.parametrize(
    ("mode", "options", "bound"),
    [
        ("DFA", {}, 1 / math.sqrt(D)),
        ("sDFA", {}, 1 / math.sqrt(D)),
        ("DRTP", {}, math.sqrt(6 / D)),
        ("DFA", {"scale": None}, 1.0),
        ("DFA", {"scale": "kaiming"}, math.sqrt(6 / D)),
        ("DFA", {"scale": 0.25}, 0.25),
    ],
)
def test_b_is_uniform_within_the_bound_of_its_source(mode, options, bound):
    b = make_rule(mode, options).draw(TEMPLATE, RNG)["B"]
    assert b.shape == (D, K)
    assert b.dtype == torch.float64
    assert bound * (1 - 15 / b.numel()) < b.abs().max() <= bound
    assert abs(b.mean()) < of_mean(bound / math.sqrt(3), b.numel())
    assert b.square().mean() == pytest.approx(
        bound**2 / 3, abs=of_mean(bound**2 * math.sqrt(4 / 45), b.numel())
    )


def test_dfa_sends_the_error_and_sdfa_its_sign():
    e = torch.tensor([[0.5, -2.0, 0.0]])
    assert torch.equal(make_rule("DFA", {}).signal(e, None), e)
    assert torch.equal(make_rule("sDFA", {}).signal(e, None), torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 10), (4, 5, 10)])
def test_drtp_finds_the_targets_of_a_cross_entropy(shape, dtype):
    """Also scaled by an average or by a loss scale."""
    logits = draw(*shape).to(dtype).requires_grad_()
    y = torch.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % 10
    for factor in (1.0, 2.0**10):
        (e,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, -2), y.flatten()) * factor, logits)
        assert torch.equal(make_rule("DRTP", {}).signal(e, None), F.one_hot(y, 10).to(dtype))


def test_direct_rules_are_described_and_told_apart():
    for mode in MODES:
        rule = make_rule(mode, {"sites": "blocks", "shared": True})
        assert is_direct(rule)
        assert describe(rule) == f"{mode}(sites='blocks', shared=True)"
        assert make_rule(mode, rule_values(rule)) == rule
    assert not is_direct(make_rule("sign", {}))


FITS = {
    "features": ((8, 3), (8, 5), Fit(8, 3, 5, False)),
    "an image": ((8, 3), (8, 5, 4, 4), Fit(8, 3, 80, False)),
    "tokens of an image": ((8, 3), (8, 7, 5), Fit(8, 3, 35, False)),
    "tokens": ((8, 7, 3), (8, 7, 5), Fit(56, 3, 5, True)),
    "tokens as rows": ((8, 7, 3), (56, 5), Fit(56, 3, 5, True)),
    "other tokens": ((8, 7, 3), (8, 6, 5), Fit(8, 21, 30, False)),
    "a squeezed output": ((8,), (8, 5), Fit(8, 1, 5, False)),
    "heads of tokens": ((8, 7, 3), (8, 7, 2, 5), Fit(56, 3, 10, True)),
    "another batch": ((8, 3), (4, 5), None),
    "windows as a batch": ((8, 3), (32, 7, 5), None),
    "no output": ((), (8, 5), None),
}


@pytest.mark.parametrize(("output", "site", "want"), FITS.values(), ids=FITS)
def test_how_b_meets_the_shapes(output, site, want):
    assert fit(output, site, batched=True, channels_first=False) == want


def test_channels_are_no_positions_and_a_single_sample_has_no_batch():
    assert fit((8, 5, 3), (8, 5, 4), batched=True, channels_first=True) == Fit(8, 15, 20, False)
    assert fit((3,), (5, 4, 4), batched=False, channels_first=True) == Fit(1, 3, 80, False)


def test_inside_attention_the_batch_comes_second():
    inside = Attention(positions=7, batch=8, batch_first=True)
    assert Place((7, 8, 5), attention=inside).fit((8, 3)) == Fit(8, 3, 35, False)
    assert Place((56, 5), attention=inside).fit((8, 3)) == Fit(8, 3, 35, False)
    assert Place((7, 8, 5), attention=inside).fit((8, 7, 3)) == Fit(56, 3, 5, True)
    outside = inside._replace(batch_first=False)
    assert Place((7, 8, 5), attention=outside).fit((7, 8, 3)) == Fit(56, 3, 5, True)
    assert Place((7, 8, 5), attention=outside).fit((8, 3)) == Fit(8, 3, 35, False)


def use(width: int, features: int | None = None) -> Use:
    return Use(Fit(2, K, width if features is None else features, False), width, TEMPLATE.new_empty(0))


def test_b_follows_from_seed_name_and_draw_count_alone():
    def b(seed: int = 0, name: str = "fc", draws: int = 0, recompute: bool = False) -> torch.Tensor:
        info = LayerInfo(name, "Linear", (7, D), D)
        return Projection(make_rule("DFA", {}), info, seed, draws, recompute).matrix(use(D))

    assert torch.equal(b(), b())
    assert torch.equal(b(), b(recompute=True))
    for other in (b(seed=1), b(name="fc2"), b(draws=1)):
        assert not torch.equal(b(), other)


def test_rows_of_a_matrix_do_not_depend_on_how_many_there_are():
    rule = make_rule("DFA", {"scale": None, "shared": True})
    small, large = (Projection(rule, INFO, 0).matrix(use(width)) for width in (10, D))
    assert torch.equal(small, large[:10])
    assert torch.equal(Projection(rule, INFO, 0).matrix(use(D, features=10)), small)
    assert torch.equal(Projection(rule, LayerInfo("other", "Linear", (1, 1), 1), 0).matrix(use(10)), small)


def test_what_is_kept_and_what_is_not():
    kept, drawn = (Projection(make_rule("DFA", {}), INFO, 0, recompute=r) for r in (False, True))
    assert kept.matrix(use(D)).data_ptr() == kept.matrix(use(D)).data_ptr()
    assert drawn.matrix(use(D)).data_ptr() != kept.matrix(use(D)).data_ptr()
    first = drawn.matrix(use(D))
    drawn.redraw()
    kept.redraw()
    assert not torch.equal(first, drawn.matrix(use(D)))
    assert torch.equal(kept.matrix(use(D)), drawn.matrix(use(D)))
