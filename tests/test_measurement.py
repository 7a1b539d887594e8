"""The measures, against values worked out by hand and against the oracle's gradients."""

import copy
import math

import pytest
import torch
from support import bounds
from support.oracle import (
    by_backprop,
    by_saved_tensors,
    gradients,
    input_gradient,
    probe,
    swapped_saved_tensors,
)
from support.problems import Net, draw, layer_names, mlp, patched_copy, random_feedback, redrawn
from support.rules import EVERY_RULE, PATCH_ALL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feedbackhook
from feedbackhook.core.angles import Sums

ANGLES = [
    ([1.0, 0.0], [0.0, 2.0], 90.0),
    ([1.0, 0.0], [3.0, 3.0], 45.0),
    ([1.0, 2.0], [-2.0, -4.0], 180.0),
    ([1.0, 1.0, 0.0], [0.0, 1.0, 1.0], 60.0),
    ([1.0, 0.0], [1.0, 1e-5], math.degrees(1e-5)),
]
WEIGHT_METRICS = {"weight_angle", "sign_agreement", "norm_ratio"}
NETWORK_METRICS = {*WEIGHT_METRICS, "gradient_angle"}
METRICS = {*NETWORK_METRICS, "error_angle"}


def by_hand(a: Tensor, b: Tensor) -> float:
    """The angle in degrees by the arc cosine."""
    a, b = a.flatten().tolist(), b.flatten().tolist()
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return math.degrees(math.acos(max(-1, min(1, product / math.hypot(*a) / math.hypot(*b)))))


def values(rows: list[feedbackhook.Row], metric: str) -> dict[str | None, float]:
    return {row.layer: row.value for row in rows if row.metric == metric}


@pytest.mark.parametrize(("a", "b", "expected"), ANGLES, ids=str)
def test_angles_in_degrees(a, b, expected):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert Sums.of(a, b).angle == pytest.approx(expected, abs=bounds.ANGLE)
    assert Sums.of(b.float(), a.float()).angle == pytest.approx(expected, rel=bounds.HALF_OF_FLOAT32)


def test_the_angle_between_a_tensor_and_itself_is_exactly_zero():
    a = torch.randn(700, 300)
    assert Sums.of(a, a.clone()).angle == 0
    assert Sums.of(a, 2 * a).angle == pytest.approx(0, abs=bounds.ANGLE)


def test_the_angle_with_nothing_is_not_a_number():
    assert math.isnan(Sums.of(torch.ones(3), torch.zeros(3)).angle)
    assert math.isnan(Sums().angle)


def test_sign_agreement_counts_the_entries_that_are_nonzero_in_both():
    v, w = torch.tensor([1.0, -1.0, 2.0, 0.0, 5.0, 1e-30]), torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0, 1e-30])
    assert Sums.of(v, w).sign_agreement == pytest.approx(3 / 4)
    assert math.isnan(Sums.of(torch.zeros(3), torch.ones(3)).sign_agreement)


def test_norm_ratio():
    assert Sums.of(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).norm_ratio == pytest.approx(2.5)
    assert math.isnan(Sums.of(torch.ones(2), torch.zeros(2)).norm_ratio)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, (1 << 17) - 1, 1 << 17, 3 << 17, 400_001])
def test_sums_of_blocks_are_those_of_the_whole(n, dtype):
    given = [torch.randn(n, dtype=dtype) for _ in range(2)]
    a, b = (x.double() for x in given)
    want = [a @ b, a @ a, b @ b, (a * b > 0).sum(), (a * b != 0).sum()]
    assert Sums.of(*given) == pytest.approx([float(x) for x in want], rel=1e-12)
    assert all(torch.equal(x, before) for x, before in zip(given, (a, b), strict=True))


def test_memory_layout_does_not_matter():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in (a, b)]
    for mixed in (channels_last, (a, channels_last[1]), (a.mT.contiguous().mT, b)):
        assert Sums.of(*mixed) == pytest.approx(Sums.of(a, b), rel=1e-12)


def test_without_a_loss_three_metrics_a_layer_and_of_all():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    given = {"0": -model[0].weight.detach(), "2": 3 * model[2].weight.detach()}
    with feedbackhook.patch(model, "tensor", feedback=given) as patch:
        rows = feedbackhook.measure(patch)
    assert [(row.layer, row.metric) for row in rows] == [
        (layer, metric)
        for layer in ("0", "2", None)
        for metric in ("weight_angle", "sign_agreement", "norm_ratio")
    ]
    assert [row.value for row in rows][:6] == pytest.approx([180, 0, 1, 0, 1, 3], abs=bounds.ANGLE)
    both = [
        torch.cat([t.detach().flatten() for t in ts])
        for ts in (given.values(), (model[0].weight, model[2].weight))
    ]
    assert values(rows, "weight_angle")[None] == pytest.approx(by_hand(*both), rel=1e-6)
    assert values(rows, "sign_agreement")[None] == pytest.approx(15 / 35)
    assert values(rows, "norm_ratio")[None] == pytest.approx(float(both[0].norm() / both[1].norm()), rel=1e-6)


def tied() -> nn.Module:
    """Two layers of one weight, which is so used twice."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return redrawn(model)


def two_convolutions() -> nn.Module:
    return redrawn(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 2)))


NETWORKS = {
    "mlp": (mlp, (3, 4), True),
    "sequence": (mlp, (3, 2, 4), True),
    "one vector": (mlp, (4,), False),
    "cnn": (lambda: redrawn(Net()), (2, 2, 6, 6), True),
    "one image": (two_convolutions, (2, 6, 6), False),
}


@pytest.mark.parametrize(("build", "shape", "batched"), NETWORKS.values(), ids=NETWORKS)
def test_every_angle_is_the_one_worked_out_by_hand(build, shape, batched):
    plain, x = build(), draw(*shape)
    names = layer_names(plain)
    model, feedback = patched_copy(plain)
    rows = feedbackhook.measure(
        feedbackhook.get_patch(model), probe(model(x.clone().requires_grad_())), per_sample=True
    )
    assert {row.metric for row in rows if row.layer is None} == NETWORK_METRICS

    delivered, exact = by_saved_tensors(plain, feedback, x).parameters, by_backprop(plain, x).parameters
    for metric, (a, b) in {
        "weight_angle": (feedback, {name: plain.get_submodule(name).weight for name in names}),
        "gradient_angle": tuple({name: g[f"{name}.weight"] for name in names} for g in (delivered, exact)),
    }.items():
        want = {name: by_hand(a[name], b[name]) for name in names}
        want[None] = by_hand(*(torch.cat([t[name].flatten() for name in names]) for t in (a, b)))
        assert values(rows, metric) == pytest.approx(want, abs=1e-5)

    products = products_with_error_signals(plain, feedback, x)
    whole = {name: by_hand(*pair) for name, pair in products.items()}
    assert values(rows, "error_angle") == pytest.approx(whole, abs=1e-5)
    single = {}
    for name, pair in products.items():
        samples = zip(*pair, strict=True) if batched else [pair]
        angles = [by_hand(v, w) for v, w in samples]
        single[name] = sum(angles) / len(angles)
        assert values(rows, "error_angle_samples")[name] == len(angles)
    assert values(rows, "error_angle_per_sample") == pytest.approx(single, abs=1e-5)


def products_with_error_signals(plain, feedback, x, same=()) -> dict[str, tuple[Tensor, Tensor]]:
    """V's and W's product with the error signal that arrives at each layer by the oracle. `same` are layers
    that share the weight, and so the V, of layer "0"."""
    model = copy.deepcopy(plain)
    seen: dict[str, tuple[torch.Size, Tensor]] = {}

    def keep(name: str, input: Tensor, output: Tensor) -> None:
        output.retain_grad()
        seen[name] = input.shape, output

    for name in (*feedback, *same):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, args, output, name=name: keep(name, args[0], output))
    with swapped_saved_tensors(model, feedback):
        probe(model(x.clone().requires_grad_())).backward()
    return {
        name: tuple(
            input_gradient(model.get_submodule(name), weight, output.grad, shape)
            for weight in (feedback["0" if name in same else name], plain.get_submodule(name).weight.detach())
        )
        for name, (shape, output) in seen.items()
    }


def test_a_tied_weight_is_one_layer_whose_calls_count_together():
    plain, x = tied(), draw(3, 4)
    model = copy.deepcopy(plain)
    v = {name: random_feedback(plain, [name])[name] for name in ("0", "4")}
    patch = feedbackhook.patch(model, "tensor", feedback=v)
    rows = feedbackhook.measure(patch, probe(model(x.clone().requires_grad_())))
    delivered = by_saved_tensors(plain, v, x).parameters["0.weight"]
    exact = by_backprop(plain, x).parameters["0.weight"]
    assert values(rows, "gradient_angle")["0"] == pytest.approx(by_hand(delivered, exact), abs=1e-5)
    products = products_with_error_signals(plain, v, x, same=["2"])
    both = [torch.cat([products[name][side].flatten() for name in ("0", "2")]) for side in (0, 1)]
    assert values(rows, "error_angle")["0"] == pytest.approx(by_hand(*both), abs=1e-5)


def test_symmetric_feedback_has_no_angle_at_all():
    plain, x = redrawn(Net()), draw(2, 2, 6, 6)
    patch = feedbackhook.patch(plain, "symmetric")
    rows = feedbackhook.measure(patch, probe(plain(x.requires_grad_())), per_sample=True)
    assert {row.value for row in rows if row.metric.startswith(("weight_angle", "gradient_angle"))} == {0}
    assert set(values(rows, "error_angle").values()) | set(
        values(rows, "error_angle_per_sample").values()
    ) == {0}
    assert set(values(rows, "sign_agreement").values()) | set(values(rows, "norm_ratio").values()) == {1}


@pytest.mark.parametrize("mode", EVERY_RULE)
def test_the_last_layers_gradient_is_backprops_under_every_rule(mode):
    """No feedback weight lies between it and the loss."""
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, mode, **EVERY_RULE[mode], **PATCH_ALL)
    rows = feedbackhook.measure(patch, probe(model(x)))
    angles = values(rows, "gradient_angle")
    assert angles["4"] == 0
    assert (angles["0"] == 0) == (mode == "symmetric")


@pytest.mark.parametrize(
    ("mode", "cosine"), [("uSF", (2 / math.pi) ** 0.5), ("brSF", (1.5 / math.pi) ** 0.5), ("random", 0)]
)
def test_weight_angles_start_where_the_definitions_say(mode, cosine):
    """For Gaussian W: cos = sqrt(2/pi) for sign(W), sqrt(3/4) of that with uniform magnitudes."""
    model = nn.Sequential(nn.Linear(500, 400), nn.Linear(400, 300))
    for layer in model:
        nn.init.normal_(layer.weight)
    rows = feedbackhook.measure(feedbackhook.patch(model, mode))
    assert list(values(rows, "weight_angle").values()) == pytest.approx(
        [math.degrees(math.acos(cosine))] * 3, abs=bounds.of_angle(300 * 400)
    )


class Checkpointed(nn.Module):
    """Dropout and batch normalization inside a checkpoint, which runs them again in each backward."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.stem, self.head, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 3), reentrant
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


def run(measured: bool, mode: str, autocast: bool, accumulate: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and the state of some steps of training."""
    torch.manual_seed(3)
    model = Checkpointed()
    patch = feedbackhook.patch(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, seen = [], []
    patch.on_error_signal("head", lambda grad_input, grad_output: seen.append(grad_output.sum().item()))
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = probe(model(torch.randn(5, 4)).float())
            if measured:
                before = patch.layers, [p.grad for p in model.parameters()], torch.get_rng_state(), len(seen)
                rows = feedbackhook.measure(patch, loss)
                after = patch.layers, [p.grad for p in model.parameters()], torch.get_rng_state(), len(seen)
                assert before[0] == after[0]
                assert all(a is b for a, b in zip(before[1], after[1], strict=True))
                assert torch.equal(before[2], after[2])
                assert before[3] == after[3]
                assert all(math.isfinite(value) for value in values(rows, "gradient_angle").values())
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses + seen, model.state_dict()


@pytest.mark.parametrize("mode", ["brSF", "frSF"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_measuring_changes_nothing(mode, autocast, accumulate):
    plainly, measured = (run(measured, mode, autocast, accumulate) for measured in (False, True))
    assert plainly[0] == measured[0]
    for name, tensor in plainly[1].items():
        assert torch.equal(tensor, measured[1][name]), name


def test_frozen_weights_have_no_gradient_angle_but_the_others():
    model, x = mlp(), draw(3, 4)
    model[2].weight.requires_grad_(False)
    rows = feedbackhook.measure(feedbackhook.patch(model, "sign"), probe(model(x.requires_grad_())))
    assert math.isnan(values(rows, "gradient_angle")["2"])
    assert all(math.isfinite(value) for value in values(rows, "error_angle").values())
    assert math.isfinite(values(rows, "gradient_angle")[None])


def test_what_is_not_defined_is_a_row_that_is_not_a_number():
    """A loss without slope, a feedback of zeros, a first layer with nothing upstream, an unused layer."""
    model, x = mlp(), draw(3, 4)
    zeros = {name: torch.zeros_like(model.get_submodule(name).weight) for name in layer_names(model)}
    patch = feedbackhook.patch(model, "tensor", feedback=zeros)
    rows = feedbackhook.measure(patch, probe(model(x)))
    assert {(row.layer, row.metric) for row in rows} == {
        (layer, metric)
        for layer in ("0", "2", "4", None)
        for metric in (METRICS if layer is not None else NETWORK_METRICS)
    }
    for metric in ("weight_angle", "sign_agreement"):
        assert all(math.isnan(value) for value in values(rows, metric).values())
    assert all(math.isnan(value) for value in values(rows, "error_angle").values())
    gradient = values(rows, "gradient_angle")
    assert [math.isnan(gradient[name]) for name in ("0", "2", "4")] == [True, True, False]
    flat = feedbackhook.measure(patch, (model(x) * 0).sum(), per_sample=True)
    assert all(math.isnan(value) for value in values(flat, "gradient_angle").values())
    assert all(math.isnan(value) for value in values(flat, "error_angle_per_sample").values())
    assert set(values(flat, "error_angle_samples").values()) == {0}


def test_only_a_part_of_the_network_is_reached():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    rows = feedbackhook.measure(patch, probe(model[:3](x)))
    assert math.isnan(values(rows, "gradient_angle")["4"])
    assert values(rows, "gradient_angle")["2"] == 0
    assert math.isnan(values(rows, "error_angle")["4"])


def test_the_graph_can_be_used_after_it_was_measured_and_measured_twice():
    plain, x = mlp(), draw(3, 4)
    model, _ = patched_copy(plain)
    patch, leaf = feedbackhook.get_patch(model), x.clone().requires_grad_()
    loss = probe(model(leaf))
    assert feedbackhook.measure(patch, loss) == feedbackhook.measure(patch, loss)
    loss.backward()
    assert torch.equal(leaf.grad, gradients(model, x).input)


def reentrant_loss(model: nn.Module, x: Tensor) -> Tensor:
    return probe(checkpoint(model, x.clone().requires_grad_(), use_reentrant=True))


def used_up(model: nn.Module, x: Tensor) -> Tensor:
    loss = probe(model(x))
    loss.backward()
    return loss


def without_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return probe(model(x))


MISUSES = {
    "used up": (used_up, RuntimeError, "before loss.backward"),
    "no scalar": (lambda model, x: model(x), ValueError, r"not \(3, 3\)"),
    "no tensor": (lambda model, x: 1.5, ValueError, "not float"),
    "without gradients": (without_grad, ValueError, "no graph"),
    "a leaf": (lambda model, x: torch.ones((), requires_grad=True), ValueError, "no graph"),
    "another model's": (lambda model, x: probe(mlp()(x)), ValueError, "no patched layer"),
    "reentrant checkpoint": (reentrant_loss, RuntimeError, "use_reentrant=False"),
}


@pytest.mark.parametrize(("make", "error", "message"), MISUSES.values(), ids=MISUSES)
def test_a_loss_that_cannot_be_measured_is_an_error_that_says_why(make, error, message):
    plain, x = mlp(), draw(3, 4)
    model, _ = patched_copy(plain)
    patch = feedbackhook.get_patch(model)
    loss = make(model, x)
    model.zero_grad()
    with pytest.raises(error, match=message):
        feedbackhook.measure(patch, loss)
    assert all(p.grad is None for p in model.parameters())
    assert gradients(model, x).input is not None


def test_a_compiled_graph_is_refused_and_the_ways_out_work():
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    loss = probe(torch.compile(model, backend="aot_eager")(x))
    with pytest.raises(RuntimeError, match=r"uncompiled model, or call measure\(patch\)"):
        feedbackhook.measure(patch, loss)
    assert {row.metric for row in feedbackhook.measure(patch)} == WEIGHT_METRICS


class Buffers(nn.Module):
    """A buffer whose entries share their memory, and a patched part in a whole with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
        self.register_buffer("shared", torch.ones(1, dtype=torch.float64).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.head, self.body(x), use_reentrant=False) * self.shared


@pytest.mark.parametrize("part", ["body", ""])
def test_buffers_stay_as_they_are_wherever_they_lie(part):
    model, x = Buffers(), draw(5, 4)
    patch = feedbackhook.patch(model.get_submodule(part), "sign")
    loss = probe(model(x))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    feedbackhook.measure(patch, loss)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    loss.backward()


def test_an_empty_batch_has_no_angles_but_rows():
    model = mlp()
    rows = feedbackhook.measure(
        feedbackhook.patch(model, "sign"), model(draw(0, 4).requires_grad_()).sum(), per_sample=True
    )
    assert all(math.isnan(value) for value in values(rows, "error_angle_per_sample").values())
    assert set(values(rows, "error_angle_samples").values()) == {0}


def test_depth_is_the_order_of_the_forward():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    model, x = redrawn(Backwards()), draw(3, 4)
    patch = feedbackhook.patch(model, "sign")
    assert {row.depth for row in feedbackhook.measure(patch)} == {None}
    rows = feedbackhook.measure(patch, probe(model(x)))
    assert {(row.layer, row.depth) for row in rows} == {("first", 0), ("last", 1), (None, None)}


@pytest.mark.parametrize("mode", ["fa", "usf"])
def test_the_peer_librarys_layer_alignment_is_our_weight_angle(mode):
    """On equal weights. (Its figure for frsf compares unsigned magnitudes with W.)"""
    reason = 'biotorch is not installed: pip install -e ".[bench]"'
    biomodule = pytest.importorskip("biotorch.module.biomodule", reason=reason)
    from biotorch.training.metrics import compute_angles_module

    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    peer = biomodule.BioModule(copy.deepcopy(plain), mode=mode)
    given = {}
    for name in ("0", "3"):
        layer = peer.module.get_submodule(name)
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight) / 10)  # so that V is not today's sign of W
        plain.get_submodule(name).weight.data.copy_(layer.weight)
        given[name] = layer.weight_backward.detach()
    ours = values(feedbackhook.measure(feedbackhook.patch(plain, "tensor", feedback=given)), "weight_angle")
    theirs = compute_angles_module(peer.module)
    assert [ours["0"], ours["3"]] == pytest.approx([theirs["0_0"], theirs["3_0"]], abs=0.01)
