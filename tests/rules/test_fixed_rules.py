"""The fixed rules beyond the paper's: V against formulas written out in float64, options and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import HALF_OF_FLOAT64, ROUNDING, of_angle, of_mean, of_share, of_std
from support.problems import redrawn
from support.rules import PATCH_ALL
from torch import nn

import feedbackhook
from feedbackhook import CounterRNG, LayerInfo
from feedbackhook.core.feedback import Feedback
from feedbackhook.rules import expected_angle, initial_distribution, make_rule

# --- V by hand -------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], int, float, float]] = {
    # layer, groups, variance of its initialization, square of sign-symmetry's scale
    "linear": (lambda: nn.Linear(7, 5), 1, 1 / (3 * 7), 1 / 7),
    "convolution": (lambda: nn.Conv2d(3, 4, (3, 2)), 1, 1 / (3 * 3 * 6), 2 / (3 * 2 * 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2, 1 / (3 * 2 * 9), 2 / (9 * 6)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), 4, 1 / (3 * 3), 2 / (3 * 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), 2, 1 / (3 * 3 * 4), 2 / (4 * 6)),
    "attention": (lambda: nn.MultiheadAttention(6, 2), 1, 2 / (6 + 18), 1 / 6),
}


def length(x: np.ndarray) -> float:
    return math.sqrt(sum(entry**2 for entry in x.flat))


def scaled(w: np.ndarray, v: np.ndarray) -> np.ndarray:
    return v * length(w) / length(v)


def by_group(w: np.ndarray, groups: int, of_one: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What a function makes of the matrix of each group."""
    made = [of_one(part.reshape(len(part), -1)) for part in np.split(w, groups)]
    return np.concatenate(made).reshape(w.shape)


def at_angle(w: np.ndarray, r: np.ndarray, degrees: float) -> np.ndarray:
    across = r - (r * w).sum() / (w * w).sum() * w
    a = math.radians(degrees)
    return math.cos(a) * w + math.sin(a) * length(w) / length(across) * across


def quantized(w: np.ndarray, bits: int) -> np.ndarray:
    n, largest = 2 ** (bits - 1) - 1, abs(w).max()
    return np.array([round(n * entry / largest) / n * largest for entry in w.flat]).reshape(w.shape)


def toeplitz(w: np.ndarray, t: np.ndarray) -> np.ndarray:
    v = np.zeros_like(w)
    m, n = len(w) // len(t), w.shape[1]
    for group, diagonals in enumerate(t):
        for i in range(m):
            for j in range(n):
                v[group * m + i, j] = diagonals[i - j + n - 1]
    return v


def polar(w: np.ndarray) -> np.ndarray:
    """W (W^T W)^(-1/2), where the root is that of the eigenvalues that are not zero."""
    values, vectors = np.linalg.eigh(w.T @ w)
    inverse = [1 / math.sqrt(value) if value > 1e-9 else 0.0 for value in values]
    return w @ (vectors * inverse) @ vectors.T


def largest_directions(w: np.ndarray, rank: int) -> np.ndarray:
    _, vectors = np.linalg.eigh(w.T @ w)
    kept = vectors[:, -rank:]
    return w @ kept @ kept.T


class Draws:
    """The random numbers of a layer, as float64 arrays."""

    def __init__(self, rng: CounterRNG, weight: torch.Tensor) -> None:
        self.rng, self.weight = rng, weight

    def normal(self, *shape: int, stream: str = "") -> np.ndarray:
        return self.rng.normal(torch.empty(shape or self.weight.shape), stream).double().numpy()

    def uniform(self) -> np.ndarray:
        return self.rng.uniform(self.weight).double().numpy()


def low_rank(w: np.ndarray, groups: int, std: float, rank: int, draws: Draws) -> np.ndarray:
    m, n = len(w) // groups, w[0].size
    q, p = draws.normal(groups, m, rank, stream="Q"), draws.normal(groups, rank, n, stream="P")
    v = np.zeros((groups, m, n))
    for k in range(rank):
        v += std / math.sqrt(rank) * q[:, :, k : k + 1] * p[:, k : k + 1, :]
    return v.reshape(w.shape)


FORMULAS: list[tuple[str, dict[str, Any], Callable[..., np.ndarray]]] = [
    ("FA", {}, lambda w, d, g, std, s: math.sqrt(3) * std * (2 * d.uniform() - 1)),
    ("uSF-SN", {}, lambda w, d, g, std, s: np.sign(w) * length(w) / length(np.sign(w))),
    ("uSF-init", {}, lambda w, d, g, std, s: abs(std * d.normal()) * np.sign(w)),
    ("uSF-init", {"std": 0.3}, lambda w, d, g, std, s: abs(0.3 * d.normal()) * np.sign(w)),
    ("sign-symmetry", {}, lambda w, d, g, std, s: s * np.sign(w)),
    ("angle", {}, lambda w, d, g, std, s: at_angle(w, d.normal(), 45)),
    ("angle", {"degrees": 110.5}, lambda w, d, g, std, s: at_angle(w, d.normal(), 110.5)),
    ("noise", {}, lambda w, d, g, std, s: scaled(w, w + length(w) / math.sqrt(w.size) * d.normal())),
    (
        "noise",
        {"level": 0.5, "scale": None},
        lambda w, d, g, std, s: w + 0.5 * math.sqrt((w * w).mean()) * d.normal(),
    ),
    ("sparse", {"share": 0.6}, lambda w, d, g, std, s: scaled(w, w * (d.uniform() < 0.6))),
    ("sparse", {"share": 0.6, "scale": None}, lambda w, d, g, std, s: w * (d.uniform() < 0.6)),
    ("quantized", {}, lambda w, d, g, std, s: scaled(w, quantized(w, 4))),
    ("quantized", {"bits": 2, "scale": None}, lambda w, d, g, std, s: quantized(w, 2)),
    ("quantized", {"bits": 1, "scale": None}, lambda w, d, g, std, s: abs(w).mean() * np.sign(w)),
    ("low_rank", {}, lambda w, d, g, std, s: low_rank(w, g, std, 8, d)),
    ("low_rank", {"rank": 2, "std": 0.3}, lambda w, d, g, std, s: low_rank(w, g, 0.3, 2, d)),
    (
        "toeplitz",
        {},
        lambda w, d, g, std, s: toeplitz(w, std * d.normal(g, len(w) // g + w.shape[1] - 1, *w.shape[2:])),
    ),
    ("svd", {}, lambda w, d, g, std, s: scaled(w, by_group(w, g, polar))),
    (
        "svd",
        {"power": -1, "scale": None},
        lambda w, d, g, std, s: by_group(w, g, lambda part: np.linalg.pinv(part).T),
    ),
    (
        "svd",
        {"power": 1, "rank": 2, "scale": None},
        lambda w, d, g, std, s: by_group(w, g, lambda part: largest_directions(part, 2)),
    ),
]
SCALED_IN_FLOAT32 = {"FA", "uSF-init", "low_rank", "toeplitz"}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("mode", "options", "formula"), FORMULAS, ids=lambda value: "" if callable(value) else str(value)
)
def test_v_is_the_formula(kind, mode, options, formula):
    build, groups, variance, scale = LAYERS[kind]
    layer = redrawn(build())
    with feedbackhook.patch(layer, mode, seed=4, **options, **PATCH_ALL) as patch:
        row = patch.layers[0]
        w, v = patch.weight(row.name), patch.feedback(row.name)
    draws = Draws(CounterRNG(4, row.info), w)
    wanted = formula(w.numpy(), draws, groups, math.sqrt(variance), math.sqrt(scale))
    # a draw is a float32 number; its scaling and the sum of up to 8 products round a few times
    rounding = 16 * ROUNDING["float32"] if mode in SCALED_IN_FLOAT32 else HALF_OF_FLOAT64
    assert v.dtype == torch.float64
    assert length(wanted) > 0
    np.testing.assert_allclose(v.numpy(), wanted, rtol=0, atol=rounding * abs(wanted).max())


# --- initialization --------------------------------------------------------------------------------------


def conv1d_of_transformers() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(600, 500)


CONSTRUCTORS = {
    "Linear": lambda: nn.Linear(500, 600),
    "Conv2d": lambda: nn.Conv2d(200, 300, 3, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(200, 300, (3, 2), groups=2),
    "MultiheadAttention": lambda: nn.MultiheadAttention(300, 3),
    "MultiheadAttention, other sizes": lambda: nn.MultiheadAttention(300, 3, kdim=700, vdim=400),
    "Conv1D": conv1d_of_transformers,
}


@pytest.mark.parametrize("kind", CONSTRUCTORS)
def test_feedback_alignment_draws_as_the_constructor_does(kind):
    model = CONSTRUCTORS[kind]()
    patch = feedbackhook.patch(model, "FA")
    for row in patch.layers:
        w, v = patch.weight(row.name).double(), patch.feedback(row.name).double()
        n, drawn = w.numel(), initial_distribution(row.info)
        limit = math.sqrt(3) * drawn.std * (1 + 4 * ROUNDING["float32"])
        for x in (w, v):
            assert x.std() == pytest.approx(drawn.std, rel=of_std(n)), row.name
            assert x.mean() == pytest.approx(0, abs=of_mean(drawn.std, n))
            assert (x.abs().max() <= limit) == (drawn.name == "uniform")
        angle = next(each.value for each in feedbackhook.measure(patch) if each.layer == row.name)
        assert angle == pytest.approx(90, abs=of_angle(n))


@pytest.mark.parametrize("init", ["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d"])
def test_feedback_alignment_draws_as_torchs_initialization_of_that_name(kind, init):
    model = CONSTRUCTORS[kind]()
    how = {"nonlinearity": "relu"} if init.startswith("kaiming") else {}
    getattr(nn.init, f"{init}_")(model.weight, **how)
    v = feedbackhook.patch(model, "FA", init=init).feedback("").double()
    w = model.weight.detach().double()
    assert v.std() == pytest.approx(float(w.std()), rel=2 * of_std(w.numel()))
    assert v.abs().max() == pytest.approx(float(w.abs().max()), rel=0.5 if init.endswith("normal") else 1e-3)


def test_a_layer_of_unknown_initialization_is_refused_by_name():
    layer = LayerInfo("block.mixer", "Mixer", (3, 4), 4)
    for mode in ("FA", "uSF-init", "low_rank", "toeplitz"):
        with pytest.raises(ValueError, match=r"how a Mixer such as 'block.mixer' is initialized is not"):
            Feedback(make_rule(mode, {}), layer, seed=0)(torch.ones(3, 4))


# --- statistics ------------------------------------------------------------------------------------------

N = 1200


@pytest.fixture(scope="module")
def gaussian():
    layer = nn.Linear(N, N, bias=False)
    layer.weight.data = 0.02 * torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    return layer


def weight_angle(layer: nn.Module, mode: str, **options: Any) -> float:
    with feedbackhook.patch(layer, mode, **options, **PATCH_ALL) as patch:
        return feedbackhook.measure(patch)[0].value


@pytest.mark.parametrize(
    ("mode", "options", "degrees"),
    [
        ("FA", {}, 90.0),
        ("uSF-SN", {}, math.degrees(math.acos(math.sqrt(2 / math.pi)))),
        ("uSF-init", {}, math.degrees(math.acos(2 / math.pi))),
        ("sign-symmetry", {}, math.degrees(math.acos(math.sqrt(2 / math.pi)))),
        ("angle", {"degrees": 30}, 30.0),
        ("noise", {"level": 0.25}, math.degrees(math.atan(0.25))),
        ("noise", {"level": 3.0, "scale": None}, math.degrees(math.atan(3.0))),
        ("sparse", {"share": 0.25}, 60.0),
        ("low_rank", {}, 90.0),
        ("toeplitz", {}, 90.0),
        ("quantized", {"bits": 1}, math.degrees(math.acos(math.sqrt(2 / math.pi)))),
    ],
    ids=str,
)
def test_angles_of_a_gaussian_weight(gaussian, mode, options, degrees):
    # the fewer random numbers V is made of, the more it varies: low_rank has 8 * 2 N of them, toeplitz 2 N
    numbers = {"low_rank": 16 * N, "toeplitz": 2 * N}.get(mode, N * N)
    measured = weight_angle(gaussian, mode, **options)
    assert measured == pytest.approx(degrees, abs=2 * of_angle(numbers))
    assert expected_angle(make_rule(mode, options), gaussian.weight) == pytest.approx(
        measured, abs=2 * of_angle(numbers)
    )


@pytest.mark.parametrize("bits", [2, 3, 6, 16])
def test_the_expected_angle_of_quantized_is_exact_and_falls_with_the_bits(gaussian, bits):
    expected = expected_angle(make_rule("quantized", {"bits": bits}), gaussian.weight)
    assert weight_angle(gaussian, "quantized", bits=bits) == pytest.approx(expected, abs=1e-3)
    fewer = expected_angle(make_rule("quantized", {"bits": bits - 1}), gaussian.weight)
    assert expected < fewer or bits == 2  # two bits drop small weights, one bit keeps their signs


def test_zero_feedback_has_no_expected_angle():
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    for mode in ("uSF-SN", "uSF-init", "sign-symmetry", "angle", "noise", "sparse", "quantized"):
        assert math.isnan(expected_angle(make_rule(mode, {}), zeros)), mode
    assert math.isnan(expected_angle(make_rule("sparse", {"share": 0}), ones))
    assert math.isnan(expected_angle(make_rule("uSF-init", {"std": 0}), ones))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_sparse_keeps_its_share_of_the_entries(gaussian, share):
    with feedbackhook.patch(gaussian, "sparse", share=share, scale=None) as patch:
        v = patch.feedback("")
    assert (v != 0).double().mean() == pytest.approx(share, abs=of_share(share, N * N))
    assert torch.equal(v[v != 0], gaussian.weight.detach()[v != 0])


@pytest.mark.parametrize("groups", [1, 3])
def test_low_rank_has_its_rank_and_standard_deviation(groups):
    layer, rank = nn.Conv1d(60, 90, 5, groups=groups), 4
    with feedbackhook.patch(layer, "low_rank", rank=rank, std=0.3) as patch:
        v = patch.feedback("").double()
    parts = v.reshape(groups, 90 // groups, -1)
    for part in parts:
        assert torch.linalg.matrix_rank(part, rtol=2.0**-20) == rank
    _, m, n = parts.shape
    # its square sums over Q^T Q and P P^T, each the mean of rank * m and of rank * n squares in each group
    relative = math.sqrt((2 / (m * rank) + 2 / (n * rank) + 2 / (m * n)) / groups) / 2
    assert v.square().mean().sqrt() == pytest.approx(0.3, rel=5 * relative)


@pytest.mark.parametrize("mode", ["angle", "noise", "sparse", "quantized", "svd", "uSF-SN"])
def test_knobs_change_the_direction_alone(mode):
    layer = redrawn(nn.Conv2d(8, 6, 3, groups=2))
    with feedbackhook.patch(layer, mode, **PATCH_ALL) as patch:
        v = patch.feedback("")
    assert v.norm() == pytest.approx(float(layer.weight.detach().norm()), rel=HALF_OF_FLOAT64)


OF_TODAYS_WEIGHT = ["uSF-SN", "uSF-init", "sign-symmetry", "angle", "noise", "sparse", "quantized", "svd"]


@pytest.mark.parametrize("mode", OF_TODAYS_WEIGHT)
def test_an_all_zero_weight_has_zero_feedback(mode):
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    with feedbackhook.patch(layer, mode, **PATCH_ALL) as patch:
        assert torch.equal(patch.feedback(""), torch.zeros(3, 4))


@pytest.mark.parametrize("mode", ["uSF-SN", "uSF-init", "sign-symmetry", "sparse", "quantized"])
def test_a_pruned_weight_has_no_feedback(mode):
    layer = redrawn(nn.Linear(40, 30))
    layer.weight.data[:, ::3] = 0
    with feedbackhook.patch(layer, mode, **PATCH_ALL) as patch:
        assert not patch.feedback("")[:, ::3].any()


REFUSED = [
    ("FA", {"init": "orthogonal"}, ValueError, r"init must be one of 'layer', 'kaiming_uniform', "),
    ("uSF-SN", {"scale": 1.0}, TypeError, r"mode 'uSF-SN' has no option 'scale'; it has none"),
    ("uSF-init", {"std": -1}, ValueError, r"std must be finite and at least 0, not -1"),
    ("sign-symmetry", {"scale": 1}, TypeError, r"mode 'sign-symmetry' has no option 'scale'; it has none"),
    ("angle", {"degrees": 181}, ValueError, r"degrees must be from 0 to 180, not 181"),
    ("angle", {"degrees": "steep"}, TypeError, r"degrees must be a number, not 'steep'"),
    ("angle", {"degree": 45}, TypeError, r"no option 'degree'; .* did you mean 'degrees'\?"),
    ("angle", {"redraw": "always"}, ValueError, r"redraw must be one of 'never', 'update', not 'always'"),
    ("noise", {"level": -0.1}, ValueError, r"level must be finite and at least 0, not -0.1"),
    ("noise", {"scale": "fan_in"}, ValueError, r"scale must be one of 'norm', not 'fan_in'"),
    ("sparse", {"share": 1.1}, ValueError, r"share must be from 0 to 1, not 1.1"),
    ("sparse", {"scale": 2.0}, ValueError, r"scale must be one of 'norm', not 2.0"),
    ("quantized", {"bits": 0}, ValueError, r"bits must be from 1 to 16, not 0"),
    ("quantized", {"bits": 17}, ValueError, r"bits must be from 1 to 16, not 17"),
    ("quantized", {"bits": 2.5}, TypeError, r"bits must be a whole number, not 2.5"),
    ("low_rank", {"rank": 0}, ValueError, r"rank must be at least 1, not 0"),
    ("low_rank", {"rank": True}, TypeError, r"rank must be a whole number, not True"),
    ("low_rank", {"std": float("inf")}, ValueError, r"std must be finite and at least 0, not inf"),
    ("toeplitz", {"std": "wide"}, TypeError, r"std must be a number, not 'wide'"),
    ("svd", {"power": 5}, ValueError, r"power must be from -4 to 4, not 5"),
    ("svd", {"rank": 1.5}, TypeError, r"rank must be a whole number, not 1.5"),
    ("quantised", {}, ValueError, r"unknown mode 'quantised'; .* did you mean 'quantized'\?"),
]


@pytest.mark.parametrize(("mode", "options", "error", "message"), REFUSED, ids=str)
def test_bad_options_are_refused_by_name(mode, options, error, message):
    with pytest.raises(error, match=message):
        make_rule(mode, options)
