"""Rules that learn from activity, noise or products: gradients against autograd of the published losses."""

from __future__ import annotations

import math

import pytest
import torch
from support import bounds
from support.oracle import TOLERANCE, probe
from support.problems import NETWORKS, draw, mlp, redrawn
from torch import Tensor, nn
from torch.func import functional_call

import feedbackhook

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Products:
    """The products of an unpatched layer with any weight: V x, and V^T y as the gradient of V x."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x.detach()

    def apply(self, v: Tensor, x: Tensor | None = None) -> Tensor:
        zero = {} if self.layer.bias is None else {"bias": torch.zeros_like(self.layer.bias)}
        return functional_call(self.layer, {"weight": v, **zero}, (self.x if x is None else x,))

    def send(self, v: Tensor, y: Tensor) -> Tensor:
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(self.apply(v, x), x, y, create_graph=True)[0]


def decay(p: Products, v: Tensor, w: Tensor) -> Tensor:
    return v.square().sum() + w.square().sum()


def self_(p: Products, v: Tensor, w: Tensor) -> Tensor:
    return -(v * w).sum()


def amp(p: Products, v: Tensor, w: Tensor) -> Tensor:
    return -(p.apply(v) * p.apply(w)).mean(0).sum()


def sparse(p: Products, v: Tensor, w: Tensor) -> Tensor:
    return p.apply(v).square().mean(0).sum() + p.apply(w).square().mean(0).sum()


def null(p: Products, v: Tensor, w: Tensor) -> Tensor:
    return p.send(v, p.apply(w)).square().mean(0).sum()


LOSSES = {
    "information": ({"alpha": 0.7, "beta": 0.3, "gamma": 0.2}, (amp, null, decay)),
    "symmetric-alignment": ({"alpha": 0.7, "beta": 0.3}, (decay, self_)),
    "activation-alignment": ({"alpha": 0.7, "beta": 0.3}, (sparse, amp)),
}


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= TOLERANCE * want.norm())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", LOSSES)
def test_alignment_rules_descend_the_published_loss(mode, network):
    build, shape = NETWORKS[network]
    options, terms = LOSSES[mode]
    plain, model, x = build(), build(), draw(*shape).requires_grad_()
    patch = feedbackhook.patch(model, mode, **options)
    inputs: dict[str, Tensor] = {}
    for row in patch.layers:
        model.get_submodule(row.name).register_forward_pre_hook(
            lambda layer, args, name=row.name: inputs.update({name: args[0]})
        )
    probe(model(x)).backward()
    learned = dict(patch.named_parameters())
    for name, seen in inputs.items():
        layer = plain.get_submodule(name)
        w, v = layer.weight.detach(), learned[f"{name}.V"].detach().requires_grad_()
        products = Products(layer, seen)
        loss = sum(
            factor * term(products, v, w) for factor, term in zip(options.values(), terms, strict=True)
        )
        assert close(learned[f"{name}.V"].grad, torch.autograd.grad(loss, v)[0]), name


@pytest.mark.parametrize("mode", LOSSES)
def test_alignment_rules_learn_from_frozen_weights_and_do_not_see_the_loss(mode):
    one, two, x = mlp(), mlp(), draw(3, 4).requires_grad_()
    first, second = feedbackhook.patch(one, mode), feedbackhook.patch(two, mode)
    for parameter in two.parameters():
        parameter.requires_grad_(False)
    probe(one(x)).backward()
    (1000 * probe(two(x))).backward()
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.norm() > 0


def test_each_projection_of_attention_counts_once():
    model = redrawn(nn.MultiheadAttention(6, 2, batch_first=True))
    patch = feedbackhook.patch(model, "symmetric-alignment")
    query, key = draw(2, 3, 6).requires_grad_(), draw(2, 4, 6, seed=3).requires_grad_()
    probe(model(query, key, key, need_weights=False)[0]).backward()
    learned = dict(patch.named_parameters())["in_proj_weight.V"]
    assert close(learned.grad, learned.detach() - model.in_proj_weight.detach())


def angles(patch: feedbackhook.Patch) -> list[float]:
    rows = feedbackhook.measure(patch)
    return [row.value for row in rows if row.metric == "weight_angle" and row.layer is not None]


@pytest.mark.parametrize("mode", LOSSES)
def test_alignment_rules_turn_v_to_a_fixed_w(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)).double()
    patch = feedbackhook.patch(model, mode)
    optimizer = torch.optim.SGD(patch.parameters(), lr=0.2)
    before = angles(patch)[1]
    for step in range(200):
        optimizer.zero_grad()
        model(draw(64, 20, seed=step)).sum().backward()
        optimizer.step()
    after = angles(patch)[1]
    assert before > 75
    if mode == "symmetric-alignment":  # the difference shrinks by 1 - lr in each step
        assert after < bounds.ANGLE
    else:  # V follows W where the activity is
        assert after < before - 20


# --- weight mirrors ----------------------------------------------------------------------------------------


def test_one_mirror_step_is_the_formula():
    layer = redrawn(nn.Sequential(nn.Linear(5, 3)))
    patch = feedbackhook.patch(layer, "WM", rate=0.25, batch=7, every=None)
    v, w, seen = patch.feedback("0"), layer[0].weight.detach(), []
    rule = patch.state.layers[0].feedback.rule

    class Rng:
        layer = patch.layers[0].info

        def normal(self, like: Tensor, stream: str) -> Tensor:
            seen.append(draw(*like.shape, seed=4))
            return seen[0]

    found = rule.mirror(w, {"V": v}, Rng())["V"]
    x = seen[0].reshape(7, 5)
    estimate = sum(torch.outer(w @ row, row) for row in x) / 7
    assert close(found, 0.75 * v + 0.25 * estimate)


KINDS = {
    "linear": lambda: nn.Linear(12, 9),
    "convolution": lambda: nn.Conv2d(4, 6, 2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
    "attention": lambda: nn.MultiheadAttention(6, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mirrors_find_a_fixed_weight_without_data(kind):
    model = redrawn(KINDS[kind]())
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    patch = feedbackhook.patch(model, "WM", rate=0.02, batch=256)
    start = angles(patch)
    patch.mirror(steps=500)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for first, last, row in zip(start, angles(patch), patch.layers, strict=True):
        inputs = math.prod(row.shape[1:])
        expected = math.degrees(math.atan(math.sqrt(0.02 * max(inputs, row.shape[0]) / (2 * 256))))
        assert first > 45
        assert last < 3 * expected
    ratios = [row.value for row in feedbackhook.measure(patch) if row.metric == "norm_ratio"]
    assert ratios == pytest.approx([1] * len(ratios), abs=0.1)


def test_mirrors_run_after_every_nth_update_and_resume_to_the_bit():
    x = draw(3, 4)

    def trained(steps: int, stop: int | None = None) -> tuple[nn.Module, feedbackhook.Patch]:
        model = mlp()
        patch = feedbackhook.patch(model, "WM", every=3, steps=2)
        for step in range(steps):
            if step == stop:
                saved, weights = patch.state_dict(), model.state_dict()
                model = mlp()
                patch = feedbackhook.patch(model, "WM", every=3, steps=2, seed=9)
                model.load_state_dict(weights)
                patch.load_state_dict(saved)
            model.zero_grad()
            probe(model(x)).backward()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
        return model, patch

    _, patch = trained(7)
    feedback = patch.state.layers[0].feedback
    assert (feedback.updates, feedback.mirrored) == (7, 4)
    _, resumed = trained(7, stop=4)
    for row in patch.layers:
        assert torch.equal(patch.feedback(row.name), resumed.feedback(row.name))


def test_mirrors_that_never_ran_are_named_and_there_must_be_one():
    model = mlp()
    patch = feedbackhook.patch(model, "WM", every=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(draw(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the feedback of '0' has not learned anything.*patch.mirror"):
        optimizer.step()
    patch.mirror()
    optimizer.step()
    patch.remove()
    with pytest.raises(ValueError, match="no layer follows a rule with a mirror phase"):
        feedbackhook.patch(model, "KP").mirror()


# --- product feedback and low rank -------------------------------------------------------------------------


def matrices(weight: Tensor, groups: int) -> Tensor:
    return weight.detach().reshape(groups, weight.shape[0] // groups, -1)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", ["PFA", "PFA-o"])
def test_pfa_trains_r_by_the_formula(mode, network):
    build, shape = NETWORKS[network]
    model, x = build(), draw(*shape).requires_grad_()
    patch = feedbackhook.patch(model, mode)
    probe(model(x)).backward()
    for layer in patch.state.layers:
        module, r = layer.module, layer.feedback.learned["R"]
        parts = layer.feedback.parts(module.weight)
        w, g = module.weight, module.weight.grad
        groups = getattr(module, "groups", 1)
        if isinstance(module, nn.ConvTranspose2d):  # in, out, kernel: B is next to the output
            b = parts["B2"]
            want = torch.einsum("giokl,goc->gickl", g.reshape(groups, -1, *g.shape[1:]), b)
            v = torch.einsum("gickl,goc->giokl", r.reshape(*r.shape[:3], *g.shape[2:]), b)
            assert close(r.grad, want.reshape(r.shape))
            assert close(patch.feedback(layer.info.name), v.reshape(w.shape))
            continue
        b = parts["B"]
        assert close(r.grad, b.mT @ matrices(g, groups))
        assert close(patch.feedback(layer.info.name), (b @ r).reshape(w.shape))
        if mode == "PFA-o":
            assert torch.allclose(b @ b.mT, torch.eye(b.shape[1], dtype=b.dtype))


@pytest.mark.parametrize(("mode", "options"), [("PFA-o", {}), ("PFA", {"expansion": 40})])
def test_the_product_of_pfa_comes_to_track_w(mode, options):
    model, x, y = mlp(), draw(6, 4), 4 * draw(6, 3, seed=5)  # far away, so that W stays large
    patch = feedbackhook.patch(model, mode, **options)
    lr, decay = 0.4, 0.05
    optimizer = torch.optim.SGD([*model.parameters(), *patch.parameters()], lr=lr, weight_decay=decay)
    layer = patch.state.layers[1]
    b = layer.feedback.parts(layer.weight())["B"][0]

    def off() -> Tensor:
        return (layer.feedback.learned["R"][0] - b.mT @ layer.weight()).detach()

    start = off()
    for _ in range(400):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert (off() - (1 - lr * decay) ** 400 * start).norm() <= 1e-6 * start.norm()
    of_product = angles(patch)[1]
    assert of_product < (1 if mode == "PFA-o" else math.degrees(math.atan(3 * math.sqrt(5 / 200))))


@pytest.mark.parametrize("network", NETWORKS)
def test_low_rank_factors_learn_by_the_formula(network):
    build, shape = NETWORKS[network]
    model, x = build(), draw(*shape).requires_grad_()
    patch = feedbackhook.patch(model, "LDFA", rank=2)
    probe(model(x)).backward()
    for layer in patch.state.layers:
        groups = getattr(layer.module, "groups", 1)
        q, p = layer.feedback.learned["Q"], layer.feedback.learned["P"]
        g = matrices(layer.module.weight.grad, groups)
        assert close(q.grad, g @ p.detach().mT)
        assert close(p.grad, q.detach().mT @ g)
        assert close(patch.feedback(layer.info.name), (q @ p).detach().reshape(layer.info.shape))


def test_low_rank_factors_may_start_at_the_best_approximation_of_w():
    model = nn.Sequential(nn.Linear(12, 9)).double()
    patch = feedbackhook.patch(model, "LDFA", rank=3, init="svd")
    a, s, bt = torch.linalg.svd(model[0].weight.detach())
    best = (a[:, :3] * s[:3]) @ bt[:3]
    assert torch.allclose(patch.feedback("0"), best)
    with pytest.raises(ValueError, match="rank cannot change while the model is patched"):
        patch.set(rank=4)
