"""The formulas of the rules, their options, and the angles that follow from them."""

import math
from dataclasses import dataclass

import pytest
import torch
from support.bounds import ROUNDING, of_angle, of_mean, of_share, of_std
from support.rules import EVERY_RULE
from torch import nn

import feedbackhook
from feedbackhook import LayerInfo
from feedbackhook.core.feedback import Feedback
from feedbackhook.rules import describe, expected_angle, make_rule, rule_name, rule_values

N = 1200
INFO = LayerInfo("fc", "Linear", (N, N), N)
WITH_SUMS = {"uSF-SN", "angle", "noise", "sparse", "quantized", "low_rank", "svd", "PFA", "PFA-o", "LDFA"}


def feedback_of(weight, mode, **options):
    info = LayerInfo("fc", "Linear", tuple(weight.shape), weight[0].numel())
    return Feedback(make_rule(mode, options), info, seed=0)


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(N, N, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def uniform():
    return torch.rand(N, N, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The angles of the reference follow from E|W| / sqrt(E W^2 E M^2), times 2 concordance - 1.
ANGLES = [
    ("uSF", {}, 37.07, 30.00),
    ("NuSF", {}, 37.07, 30.00),
    ("frSF", {}, 46.29, 41.41),
    ("brSF", {}, 46.29, 41.41),
    ("frSF", {"concordance": 0.75}, 69.8, 68.0),
    ("brSF", {"concordance": 0.75}, 69.8, 68.0),
    ("brSF", {"concordance": 0.5}, 90.0, 90.0),
    ("frSF", {"concordance": 0.0}, 180 - 46.29, 180 - 41.41),
    ("sign", {}, 46.29, 41.41),
    ("sign", {"magnitude": "uniform"}, 37.07, 30.00),
    ("sign", {"magnitude": "weight"}, 0.0, 0.0),
    ("symmetric", {}, 0.0, 0.0),
    ("random", {}, 90.0, 90.0),
    ("RndF", {}, 90.0, 90.0),
]


@pytest.mark.parametrize(
    ("mode", "options", "for_gaussian", "for_uniform"), ANGLES, ids=lambda value: str(value)
)
def test_angles_at_initialisation(gaussian, uniform, mode, options, for_gaussian, for_uniform):
    for weight, expected in ((gaussian, for_gaussian), (uniform, for_uniform)):
        v = feedback_of(weight, mode, **options)(weight)
        cosine = (v * weight).sum(dtype=torch.float64) / (v.double().norm() * weight.double().norm())
        assert math.degrees(math.acos(min(1.0, cosine))) == pytest.approx(
            expected, abs=of_angle(N * N) + 0.05
        )  # tabled to 0.1


@pytest.mark.parametrize("mode", ["sign", "frSF", "brSF"])
@pytest.mark.parametrize("concordance", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_the_share_of_agreeing_signs_is_the_concordance(gaussian, mode, concordance):
    v = feedback_of(gaussian, mode, concordance=concordance)(gaussian)
    agreeing = (torch.sign(v) == torch.sign(gaussian)).double().mean()
    assert agreeing == pytest.approx(concordance, abs=of_share(concordance, gaussian.numel()))


def test_usf_is_the_sign_and_nusf_divides_it_by_fan_in():
    weight = torch.tensor([[[[1.5, -2.0], [0.0, 3.0]], [[-1.0, 1.0], [1.0, -1.0]]]])
    sign = torch.tensor([[[[1.0, -1.0], [0.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]]]])
    assert torch.equal(feedback_of(weight, "uSF")(weight), sign)
    assert torch.equal(feedback_of(weight, "NuSF")(weight), sign / 8)


def test_magnitudes_of_the_papers_rules_are_unscaled_draws_from_0_to_1(gaussian):
    magnitudes = feedback_of(gaussian, "frSF", concordance=0.3)(gaussian).abs()
    assert magnitudes.max() <= 1
    assert magnitudes.double().mean() == pytest.approx(1 / 2, abs=of_mean(math.sqrt(1 / 12), N * N))
    assert magnitudes.double().square().mean() == pytest.approx(1 / 3, abs=of_mean(math.sqrt(4 / 45), N * N))


def test_standard_deviations_of_the_random_rules(gaussian):
    for mode, options, std in (
        ("RndF", {}, 0.05),
        ("random", {}, 1 / math.sqrt(3 * N)),
        ("random", {"std": 2}, 2),
    ):
        v = feedback_of(gaussian, mode, **options)(gaussian)
        assert v.double().std() == pytest.approx(std, rel=of_std(N * N)), (mode, options)


def test_scales_of_sign(gaussian):
    w = 0.01 * gaussian
    plain = feedback_of(w, "sign", scale=None)(w)
    torch.testing.assert_close(feedback_of(w, "sign", scale=3.0)(w), 3 * plain)
    torch.testing.assert_close(feedback_of(w, "sign", scale="fan_in")(w), plain / N)
    by_norm = feedback_of(w, "sign", scale="norm")(w)
    # A float32 sum of N * N squares rounds N * N times, to either side: by N roundings in all, in two norms.
    assert by_norm.double().norm() == pytest.approx(float(w.double().norm()), rel=2 * N * ROUNDING["float32"])
    assert torch.equal(torch.sign(by_norm), torch.sign(plain))


@pytest.mark.parametrize("options", [{}, {"magnitude": "uniform"}, {"magnitude": "weight"}], ids=str)
def test_an_all_zero_weight_has_zero_feedback(options):
    w = torch.zeros(3, 4)
    assert torch.equal(feedback_of(w, "sign", concordance=0.5, **options)(w), w)


def test_a_pruned_weight_has_no_feedback(gaussian):
    w = gaussian * (gaussian.abs() > 1)
    for mode in ("sign", "uSF", "NuSF", "frSF", "brSF"):
        v = feedback_of(w, mode)(w)
        assert torch.equal(v != 0, w != 0), mode


def test_the_sign_follows_todays_weight_while_magnitudes_and_flips_stay():
    w = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    feedback = feedback_of(w, "frSF", concordance=0.6)
    before, after = feedback(w), feedback(-w.roll(1, 0))
    assert torch.equal(before.abs(), after.abs())
    assert torch.equal(before * torch.sign(w), after * torch.sign(-w.roll(1, 0)))


def test_changing_the_concordance_keeps_the_magnitudes():
    w = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    feedback = feedback_of(w, "frSF", concordance=1.0)
    before = feedback(w)
    feedback.follow(make_rule("frSF", {"concordance": 0.0}))
    assert torch.equal(feedback(w), -before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", EVERY_RULE)
def test_v_has_the_dtype_of_the_weight_and_does_not_depend_on_it_else(mode, dtype):
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    if mode == "quantized":  # which jumps where rounding moves a weight across a threshold
        w = w.mul(32).round().div(32)  # seven bits, which every format has
    v, wanted = feedback_of(w, mode)(w.to(dtype)), feedback_of(w, mode)(w)
    assert v.dtype == dtype
    assert torch.isfinite(v).all()
    # W, its parts, the scale and their product are rounded; what underflows in float16 is below 2^-24
    rounding = max(ROUNDING[str(dtype).removeprefix("torch.")], ROUNDING["float32"])
    rtol, atol = 4 * rounding, 2.0**-24
    if mode in WITH_SUMS:  # in which parts of both signs cancel, or a norm of many squares
        rtol, atol = 0.0, 16 * rounding * float(wanted.abs().max())
    torch.testing.assert_close(v.float(), wanted, rtol=rtol, atol=atol)


def test_given_tensors_are_the_feedback():
    w, v = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(feedback_of(w, "tensor", feedback={"fc": v})(w), v)


@pytest.mark.parametrize("mode", EVERY_RULE)
def test_a_rule_can_be_written_down_and_made_again(mode):
    rule = make_rule(mode, EVERY_RULE[mode])
    assert rule_name(rule) == mode
    assert make_rule(mode, rule_values(rule)) == rule
    assert describe(rule).partition("(")[0] == mode
    assert EVERY_RULE[mode] or describe(rule) == mode


def test_a_description_shows_what_differs_from_the_defaults():
    assert describe(make_rule("sign", {"concordance": 0.8, "scale": None})) == (
        "sign(concordance=0.8, scale=None)"
    )


REFUSED = [
    ("sign", {"concordance": 1.3}, ValueError, r"concordance must be from 0 to 1, not 1.3"),
    ("sign", {"concordance": float("nan")}, ValueError, r"concordance must be from 0 to 1, not nan"),
    ("sign", {"concordance": "half"}, TypeError, r"concordance must be a number, not 'half'"),
    ("sign", {"concordance": True}, TypeError, r"concordance must be a number, not True"),
    ("sign", {"magnitude": "big"}, ValueError, r"magnitude must be one of 'random', 'uniform', 'weight'"),
    ("sign", {"redraw": "always"}, ValueError, r"redraw must be one of 'never', 'update', not 'always'"),
    ("sign", {"scale": "size"}, ValueError, r"scale must be one of 'norm', 'fan_in', not 'size'"),
    ("sign", {"scale": -1}, ValueError, r"scale must be finite and at least 0, not -1"),
    ("sign", {"scale": float("inf")}, ValueError, r"scale must be finite and at least 0, not inf"),
    ("random", {"std": -0.1}, ValueError, r"std must be finite and at least 0, not -0.1"),
    ("random", {"std": "wide"}, TypeError, r"std must be a number, not 'wide'"),
    ("uSF", {"concordance": 0.5}, TypeError, r"mode 'uSF' has no option 'concordance'; it has none"),
    ("frSF", {"scale": 1}, TypeError, r"mode 'frSF' has no option 'scale'; it has concordance"),
    ("tensor", {}, TypeError, r"mode 'tensor' needs the option 'feedback'"),
    ("tensor", {"feedback": 3}, TypeError, r"feedback must map layer names to tensors, not int"),
    ("tensor", {"feedback": {"fc": 3}}, TypeError, r"feedback\['fc'\] must be a tensor, not int"),
    ("SGD", {}, ValueError, r"unknown mode 'SGD'; known: symmetric, sign, random, tensor, uSF, NuSF"),
    (None, {}, TypeError, r"mode must be the name of a rule, not None; known: symmetric, sign"),
]


@pytest.mark.parametrize(("mode", "options", "error", "message"), REFUSED, ids=str)
def test_bad_options_are_refused_by_name(mode, options, error, message):
    with pytest.raises(error, match=message):
        make_rule(mode, options)


def test_a_rule_of_ones_own():
    @feedbackhook.register_rule("noisy")
    @dataclass(frozen=True)
    class Noisy:
        """V = W + std E, E normal and drawn once."""

        std: float = 0.1

        def draw(self, weight, rng):
            return {"E": rng.normal(weight)}

        def feedback(self, weight, parts):
            return weight + self.std * parts["E"]

    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    with feedbackhook.patch(model, "noisy", std=0.5) as patch:
        noise = patch.feedback("1") - model[1].weight.detach()
        assert noise.std() == pytest.approx(0.5, rel=of_std(noise.numel()))
        assert patch.layers[1].rule == "noisy(std=0.5)"


def test_what_is_no_rule_is_refused():
    @dataclass
    class Thawed:
        def draw(self, weight, rng): ...
        def feedback(self, weight, parts): ...

    @dataclass(frozen=True)
    class Halved:
        def draw(self, weight, rng): ...

    @dataclass(frozen=True)
    class Second(feedbackhook.rules.Sign):
        pass

    with pytest.raises(TypeError, match=r"Thawed must be a @dataclass\(frozen=True\)"):
        feedbackhook.register_rule("thawed")(Thawed)
    with pytest.raises(TypeError, match="Halved lacks feedback"):
        feedbackhook.register_rule("halved")(Halved)
    with pytest.raises(ValueError, match=r"'sign' is taken by feedbackhook.rules.sign.Sign"):
        feedbackhook.register_rule("sign")(Second)


@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("uSF", {}),
        ("NuSF", {}),
        ("frSF", {}),
        ("brSF", {"concordance": 0.75}),
        ("sign", {"concordance": 0.3}),
        ("sign", {"magnitude": "weight", "concordance": 0.8}),
        ("random", {}),
        ("symmetric", {}),
    ],
    ids=str,
)
def test_the_expected_angle_is_that_of_a_large_layer(request, distribution, mode, options):
    layer = nn.Linear(N, N)
    layer.weight.data = request.getfixturevalue(distribution).clone()
    layer.weight.data[:, ::3] = 0  # of a pruned weight V is zero too
    row = feedbackhook.measure(feedbackhook.patch(layer, mode, **options))[0]
    assert expected_angle(make_rule(mode, options), layer.weight) == pytest.approx(
        row.value, abs=of_angle(N * N * 2 // 3)
    )


def test_a_rule_need_not_know_its_angle():
    rule = make_rule("tensor", {"feedback": {}})
    assert expected_angle(rule, torch.ones(2, 2)) is None
    assert math.isnan(expected_angle(make_rule("uSF", {}), torch.zeros(2, 2)))
    assert math.isnan(expected_angle(make_rule("sign", {"scale": 0}), torch.ones(2, 2)))
