"""The profile: gradients under a grid of rules against exact backprop, before any training."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from support import bounds
from support.diagnosis import Busy, Stream, assert_same, batches, loss, net, trace
from support.oracle import swapped_saved_tensors
from support.problems import draw
from torch import Tensor, nn

import feedbackhook
from feedbackhook.diagnosis.grid import settings

LAYERS = ["0", "2", "4"]


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor], feedback: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's weight gradient, by the oracle that swaps what autograd saved."""
    weights = [model.get_submodule(name).weight for name in LAYERS]
    with swapped_saved_tensors(model, feedback):
        value = loss(model(batch[0].clone().requires_grad_()), batch[1])
        return list(torch.autograd.grad(value, weights))


def angle(a: Tensor, b: Tensor) -> float:
    cosine = float((a * b).sum() / a.norm() / b.norm())
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def test_means_and_deviations_are_those_worked_out_by_hand():
    model, given, seeds = net(), batches(2), 3
    found = feedbackhook.profile(model, given, loss, modes=["random"], seeds=seeds)
    angles: dict[str, list[float]] = {name: [] for name in LAYERS}
    ratios: dict[str, list[float]] = {name: [] for name in LAYERS}
    for seed in range(seeds):
        with feedbackhook.patch(model, "random", seed=seed) as patch:
            feedback = {name: patch.feedback(name) for name in LAYERS}
        for batch in given:
            delivered, exact = gradients(model, batch, feedback), gradients(model, batch, {})
            for name, g, backprop in zip(LAYERS, delivered, exact, strict=True):
                angles[name].append(angle(g, backprop))
                ratios[name].append(float(g.norm() / backprop.norm()))
    for metric, by_hand, bound in (
        ("gradient_angle", angles, bounds.ANGLE),
        ("gradient_norm_ratio", ratios, bounds.HALF_OF_FLOAT64),
    ):
        rows = {row.layer: row for row in found.rows if row.metric == metric}
        for name in LAYERS:
            mean, std = statistics.fmean(by_hand[name]), statistics.stdev(by_hand[name])
            assert rows[name].mean == pytest.approx(mean, rel=bounds.HALF_OF_FLOAT64, abs=bound)
            assert rows[name].std == pytest.approx(std, rel=bounds.HALF_OF_FLOAT64, abs=bound)
            assert rows[name].defined == seeds * len(given)
    assert min(angles["0"]) > 5  # far from backprop


def test_error_angles_are_those_of_measure():
    model, (batch,) = net(), batches(1)
    found = feedbackhook.profile(model, [batch], loss, modes=["random"], seeds=1)
    with feedbackhook.patch(model, "random") as patch:
        value = loss(model(batch[0]), batch[1])
        measured = {
            row.layer: row.value for row in feedbackhook.measure(patch, value) if row.metric == "error_angle"
        }
    rows = {row.layer: row.mean for row in found.rows if row.metric == "error_angle"}
    assert rows == pytest.approx({name: measured[name] for name in LAYERS}, nan_ok=True)
    assert math.isnan(rows["0"])  # it sends no error signal on


def test_under_symmetric_feedback_every_angle_is_0_and_every_ratio_1():
    found = feedbackhook.profile(net(), batches(2), loss, modes=["symmetric"], seeds=2)
    rows = [row for row in found.rows if row.metric == "gradient_angle"]
    assert [row.mean for row in rows] == [0.0] * 3
    assert [row.mean for row in found.rows if row.metric == "gradient_norm_ratio"] == [1.0] * 3
    assert found.reach("symmetric").layers == 3
    assert "all 3 layers" in found.sentence


def test_the_grid_takes_rules_concordances_and_own_names():
    names = [s.name for s in settings(["sign", "random", "brSF"], [1, 0.5])]
    assert names == [
        "sign, concordance 1",
        "sign, concordance 0.5",
        "random",
        "brSF, concordance 1",
        "brSF, concordance 0.5",
    ]
    own = {"half": {"mode": "sign", "concordance": 0.5}, "first exact": {"mode": {"2": "random"}}}
    assert [s.name for s in settings(own, [1, 0.5])] == ["half, concordance 0.5", "first exact"]
    for wrong in ({"a": {"mode": "random", "seed": 3}}, []):
        with pytest.raises(ValueError, match=r"seed|nothing to profile"):
            settings(wrong, [1])
    with pytest.raises(ValueError, match="did you mean 'random'"):
        settings(["randm"], [1])


def test_reach_counts_from_the_output_to_the_first_layer_beyond_the_angle():
    from feedbackhook.diagnosis.profiled import Profile, ProfileRow

    def rows(mode: str, concordance: float | None, angles: list[float]) -> list[ProfileRow]:
        return [
            ProfileRow(mode, concordance, f"l{d}", d, "gradient_angle", a, 1.0, 2)
            for d, a in enumerate(angles)
        ]

    every = [
        *rows("sign", 1.0, [84, 50, math.nan, 70, 40, 0]),
        *rows("sign", 0.75, [86, 80, math.nan, 80, 65, 0]),
        *rows("random", None, [91, 90, math.nan, 90, 90, 0]),
    ]
    found = Profile(every, {}, 1, 2)
    assert found.reach("sign, concordance 1") == (2, "l4", 5)
    assert found.reach("sign, concordance 1", 85) == (5, "l0", 5)
    assert found.reach("random", 85) == (1, "l5", 5)
    assert found.smallest_concordance("sign") == 1.0
    assert found.smallest_concordance("random") is None
    assert found.sentence == (
        "5 of 6 layers have an exact gradient to compare with. At best (sign, concordance 1), gradients "
        "point within 60° of backprop's in the last 2 of these 5 layers (down to l4) and within 85° in all "
        "these 5 layers; sign reaches the first of them (below 85°) from concordance 1 on."
    )


def test_layers_before_a_normalization_whose_scale_is_zero_are_named_with_what_to_do():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).tanh()
            return self.head(x + self.norm(self.two(self.one(x).tanh())))

    model = Residual().double()
    said = str(feedbackhook.profile(model, batches(2), loss, modes=["random"], seeds=1))
    assert "no gradient angle at one, two: the exact gradient is zero\n" in said
    assert "The scale of a normalization is zero (norm)" in said
    assert "--options '{zero_init_last: false}'" in said
    assert "2 of 4 layers have an exact gradient to compare with." in said
    nn.init.ones_(model.norm.weight)
    said = str(feedbackhook.profile(model, batches(2), loss, modes=["random"], seeds=1))
    assert not any(words in said for words in ("scale", "compare with", "no gradient angle"))


def test_every_layer_without_an_angle_is_named():
    from feedbackhook.diagnosis.profiled import Profile, ProfileRow

    reasons = {f"l{n}": f"the exact gradient's norm is below {n}" for n in range(5)}
    rows = [ProfileRow("random", None, name, 0, "gradient_angle", math.nan, math.nan, 0) for name in reasons]
    said = str(Profile(rows, reasons, 1, 1))
    assert "no gradient angle at l2: the exact gradient's norm is below 2\n" in said
    assert "nor, for other reasons, at l3, l4\n" in said


def test_a_planted_floor_is_named_and_its_angle_is_not_a_number():
    torch.manual_seed(0)
    given = [(x.float(), y.float()) for x, y in batches(2)]
    resolved = feedbackhook.profile(Stream(1.0), given, loss, modes=["random"], seeds=1)
    assert resolved.undefined == {}
    planted = feedbackhook.profile(Stream(1e12), given, loss, modes=["random"], seeds=1)
    assert set(planted.undefined) == {"block.1", "block.3"}
    assert "changes nothing that the number format holds" in planted.undefined["block.1"]
    angles = {row.layer: row.mean for row in planted.rows if row.metric == "gradient_angle"}
    assert math.isnan(angles["block.1"])
    assert not math.isnan(angles["stem"])
    assert "no gradient angle at block.1" in str(planted)


def failing(calls: int):
    """A loss that raises on a later call."""
    count = 0

    def of(output: Tensor, target: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count > calls:
            raise ArithmeticError("out of loss")
        return loss(output, target)

    return of


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 4, None])
def test_the_model_stays_as_it_was_also_after_errors(calls, graded):
    model = Busy()
    x, y = draw(6, 5).float(), draw(6, 3, seed=1).float()
    if graded:
        loss(model(x), y).backward()
    before = trace(model)
    torch.set_grad_enabled(graded)
    try:
        if calls is None:
            feedbackhook.profile(model, [(x, y)] * 2, loss, seeds=2)
        else:
            with pytest.raises(ArithmeticError, match="out of loss"):
                feedbackhook.profile(model, [(x, y)] * 2, failing(calls), seeds=2)
        assert torch.is_grad_enabled() == graded
    finally:
        torch.set_grad_enabled(True)
    assert_same(before, trace(model))


def test_a_loader_that_shuffles_leaves_the_random_state():
    loader = torch.utils.data.DataLoader(list(zip(draw(12, 5), draw(12, 3), strict=True)), 6, shuffle=True)
    model = net()
    before = torch.get_rng_state()
    feedbackhook.profile(model, loader, loss, modes=["random"], seeds=1)
    assert torch.equal(torch.get_rng_state(), before)


class Words(nn.Module):
    """A model that takes keyword arguments and returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": loss(self.layers(x), target)}


def test_a_batch_may_be_a_mapping_or_have_several_inputs():
    pairs = [{"x": x, "target": y} for x, y in batches(2)]
    by_name = feedbackhook.profile(Words(), pairs, lambda output, batch: output["loss"], modes=["random"])
    plain = feedbackhook.profile(net(), batches(2), loss, modes=["random"])
    several = [((x, y), y) for x, y in batches(2)]
    by_place = feedbackhook.profile(Words(), several, lambda output, y: output["loss"], modes=["random"])
    assert [row.mean for row in by_name.rows] == pytest.approx(
        [row.mean for row in by_place.rows], nan_ok=True
    )
    # V follows from the layers' names, which differ here
    assert [row.depth for row in by_name.rows] == [row.depth for row in plain.rows]


def test_direct_rules_and_frozen_layers():
    model = net()
    model[0].requires_grad_(False)
    given = [(x, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])) for x, _ in batches(2)]
    found = feedbackhook.profile(model, given, F.cross_entropy, modes=["DFA", "DRTP"], seeds=2)
    assert found.undefined == {"0": "its weight gets no gradient"}
    assert [row.layer for row in found.angles("DRTP")] == ["2", "4"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, ValueError, "empty"),
        ({"batches": [torch.ones(3, 5)]}, TypeError, r"a pair .*shape \(3, 5\)"),
        ({"seeds": 0}, ValueError, "at least 1"),
        ({"loss": lambda output, target: output}, ValueError, r"one element, not a tensor of shape \(8, 3\)"),
        ({"loss": lambda output, target: output.detach().sum()}, ValueError, "no parameter"),
        ({"modes": ["sgin"]}, ValueError, "did you mean 'sign'"),
    ],
    ids=["no batch", "no pair", "no draw", "no scalar", "no graph", "no rule"],
)
def test_what_cannot_be_profiled_is_refused_by_name(arguments, error, message):
    model = net()
    before = trace(model)
    with pytest.raises(error, match=message):
        feedbackhook.profile(model, **{"batches": batches(1), "loss": loss, **arguments})
    assert_same(before, trace(model))


def test_a_patched_model_is_refused():
    model = net()
    with feedbackhook.patch(model, "random"), pytest.raises(ValueError, match="diagnose"):
        feedbackhook.profile(model, batches(1), loss)


def test_the_figure_and_the_table_are_written(tmp_path):
    found = feedbackhook.profile(net(), batches(2), loss, seeds=2)
    paths = found.write(tmp_path / "new")
    assert [path.name for path in paths] == ["profile.csv", "profile.png"]
    over, lines, *_ = found.figure().axes
    assert [text.get_text() for text in over.get_xticklabels()] == found.conditions
    assert [text.get_text() for text in over.get_yticklabels()] == LAYERS
    assert "°" in lines.get_ylabel()
    assert len(found.table()) == len(found.rows)
    shown = str(found)
    assert all(name in shown for name in found.conditions)
    assert bounds.ANGLE < 1e-4 < max(row.std for row in found.angles("random"))
