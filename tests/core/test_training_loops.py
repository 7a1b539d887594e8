"""What training loops do beside a forward and a backward: penalties, threads, redraws in between, optimizers
that step one another, layers that use a copied slice of their weight."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_saved_tensors,
    gradients,
    probe,
    read_gradients,
)
from support.problems import MLP_UPSTREAM, draw, mlp, patched_copy, random_feedback, redrawn
from torch import Tensor, nn

import feedbackhook

# --- penalties -------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A trunk and heads, of which one works at a time while the others rest."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.heads[task](torch.tanh(self.trunk(x)))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() > 1]


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "l2": lambda model: sum(p.square().sum() for p in model.parameters()),
    "l1": lambda model: sum(p.abs().sum() for p in model.parameters()),
    "ewc": lambda model: sum((0.3 * (p - 0.1) ** 2).sum() for p in model.parameters()),
    "norm": lambda model: sum(p.norm() for p in model.parameters()),
    "orthogonality": lambda model: sum(
        (w @ w.T - torch.eye(len(w), dtype=w.dtype)).square().sum() for w in weights_of(model)
    ),
    "spectral norm": lambda model: sum(torch.linalg.matrix_norm(w, 2) for w in weights_of(model)),
    "cosine of two rows": lambda model: sum(
        F.cosine_similarity(w[0], w[1], dim=0) for w in weights_of(model)
    ),
    "product with a vector": lambda model: sum(
        torch.mv(w, torch.ones(w.shape[1], dtype=w.dtype)).square().sum() for w in weights_of(model)
    ),
}


@pytest.mark.parametrize("together", [True, False], ids=["in the loss", "in a backward of its own"])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_adds_its_gradient_to_layers_that_work_and_to_those_that_rest(penalty, together):
    plain, x = redrawn(Heads()), draw(3, 4)
    model, feedback = patched_copy(plain)
    reference = copy.deepcopy(plain)
    penalty(reference).backward()
    for task in (0, 0, 2):
        working = {name: feedback[name] for name in ("trunk", f"heads.{task}")}
        want = by_saved_tensors(plain, working, x, lambda model, x, task=task: model(x, task))
        for name, parameter in reference.named_parameters():
            both = [grad for grad in (want.parameters[name], parameter.grad) if grad is not None]
            want.parameters[name] = sum(both) if both else None
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = model(leaf, task)
            if together:
                (probe(output) + penalty(model)).backward()
            else:
                penalty(model).backward()
                probe(output).backward()
        assert_same_gradients(read_gradients(model, leaf, output), want)
    assert_unlike(want, by_backprop(plain, x, lambda model, x: model(x, 2)), ["input"])


def test_a_penalty_on_what_a_patched_weight_makes_of_an_activation_is_no_penalty_on_weights():
    """The guard's way out for penalties does not let the error signals of a plain forward pass."""
    model, x = redrawn(Heads()), draw(3, 4).requires_grad_()
    feedbackhook.patch(model)
    hidden = F.linear(F.linear(x, model.trunk.weight), model.heads[1].weight)
    with pytest.raises(feedbackhook.ExactGradientError, match=r"weight of '(trunk|heads\.1)'"):
        (probe(model(x)) + PENALTIES["l2"](model) + hidden.square().sum()).backward()


# --- threads ---------------------------------------------------------------------------------------------


def test_threads_that_share_a_model_get_the_gradients_of_one():
    """All of them are inside forwards and backwards of one patched model at the same time."""
    plain, batches = mlp(), [draw(5, 4, seed=seed) for seed in range(3)]
    model, feedback = patched_copy(plain)
    got: dict[int, list[tuple[Tensor, ...]]] = {place: [] for place in range(3)}
    errors: list[BaseException] = []
    start = threading.Barrier(3)

    def work(place: int) -> None:
        try:
            start.wait()
            for _ in range(40):
                loss = probe(model(batches[place]))
                got[place].append(torch.autograd.grad(loss, list(model.parameters())))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for place, x in enumerate(batches):
        want = by_saved_tensors(plain, feedback, x, input_requires_grad=False).parameters
        for found in got[place]:
            for gradient, expected in zip(found, want.values(), strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# --- between a forward and its backward ------------------------------------------------------------------


def redraw(patch: feedbackhook.Patch) -> None:
    patch.redraw()


def set_concordance(patch: feedbackhook.Patch) -> None:
    patch.set(concordance=0.5)


def load(patch: feedbackhook.Patch) -> None:
    state = patch.state_dict()
    for row in state["layers"].values():
        row["draws"] = 5
    patch.load_state_dict(state)


@pytest.mark.parametrize("recompute", [False, True], ids=["parts kept", "parts recomputed"])
@pytest.mark.parametrize("change", [redraw, set_concordance, load])
def test_a_graph_keeps_the_v_of_its_forward(change, recompute):
    plain, x = mlp(), draw(3, 4)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "brSF", recompute=recompute)
    feedback = {name: patch.feedback(name) for name in ("0", "2", "4")}
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    change(patch)
    probe(output).backward()
    changed = {name: patch.feedback(name) for name in ("0", "2", "4")}
    assert not any(torch.equal(changed[name], v) for name, v in feedback.items())
    got = read_gradients(model, leaf, output)
    assert_matches_oracle(got, plain, feedback, x, unlike=MLP_UPSTREAM)
    assert_matches_oracle(gradients(model, x), plain, changed, x, unlike=MLP_UPSTREAM)


# --- a copied slice in a layer's own forward -------------------------------------------------------------


class Slim(nn.Linear):
    """Uses the first three columns of its weight, copied by `how`, and of its input."""

    how: Callable[[Tensor], Tensor] = staticmethod(lambda columns: columns)
    flipped = False

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :3].flip(1) if self.flipped else x[:, :3]
        return F.linear(first, self.how(self.weight[:, :3]), self.bias)


BACKWARDS = torch.tensor([2, 1, 0])
SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": lambda w: w,
    "contiguous": lambda w: w.contiguous(),
    "clone": lambda w: w.clone(),
    "to": lambda w: w.to(torch.float64, copy=True),
    "indices": lambda w: w[:, torch.tensor([0, 1, 2])],
    "transposed and back": lambda w: w.t().contiguous().t(),
}
DETACHED: dict[str, Callable[[Tensor], Tensor]] = {
    "detached, contiguous": lambda w: w.detach().contiguous(),
    ".data, contiguous": lambda w: w.data.contiguous(),
    ".data, cloned, viewed": lambda w: w.data.clone()[:],
}
REVERSED: dict[str, Callable[[Tensor], Tensor]] = {
    "index_select": lambda w: w.index_select(1, BACKWARDS),
    "reversed indices": lambda w: w[:, BACKWARDS],
    "flip": lambda w: w.flip(1),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("how", (slices := SLICES | DETACHED | REVERSED).values(), ids=slices)
def test_a_copied_slice_of_a_weight_is_the_same_slice_of_v(how, frozen):
    plain = redrawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Slim(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    plain[2].weight.requires_grad_(not frozen)
    feedback, x = random_feedback(plain), draw(3, 4)
    model = copy.deepcopy(plain)
    model[2].how = how
    feedbackhook.patch(model, "tensor", feedback=feedback)
    plain[2].flipped = how in REVERSED.values()  # the other factor reversed is the same product
    plain[2].weight.requires_grad_(not frozen and how not in DETACHED.values())
    got = gradients(model, x)
    want = by_saved_tensors(plain, feedback, x)
    torch.testing.assert_close(got.output, want.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(got, want)
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight"])


# --- optimizers that step one another --------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as a step with a closure or in two halves (Foret et al. 2021)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.01)
        self.param_groups = self.base.param_groups
        self.shifts: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_half(self) -> None:
        self.shifts = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"]]
        for p, shift in self.shifts:
            p.add_(shift)

    @torch.no_grad()
    def second_half(self) -> None:
        for p, shift in self.shifts:
            p.sub_(shift)
        self.base.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        closure = torch.enable_grad()(closure)
        closure()
        self.first_half()
        closure()
        self.second_half()


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer inside its own step (Zhang et al. 2019)."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure: Callable[[], Tensor] | None = None) -> object:
        return self.base.step(closure)


def by_sam(model: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = SAM(model)
    return lambda: optimizer.step(closure)


def by_sam_in_halves(model: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = SAM(model)

    def update() -> None:
        closure()
        optimizer.first_half()
        closure()
        optimizer.second_half()

    return update


def by_lookahead(model: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.01))

    def update() -> None:
        closure()
        optimizer.step()

    return update


def by_lbfgs(model: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    return lambda: optimizer.step(closure)


@pytest.mark.parametrize("optimizer", [by_sam, by_sam_in_halves, by_lookahead, by_lbfgs])
def test_an_update_is_one_redraw_however_many_steps_it_is_made_of(optimizer):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model, "brSF")

    def closure() -> Tensor:
        model.zero_grad()
        loss = probe(model(x))
        loss.backward()
        return loss

    update, weight = optimizer(model, closure), model[2].weight.detach().clone()
    for number in (1, 2, 3):
        before = patch.feedback("2")
        update()
        assert [row["draws"] for row in patch.state_dict()["layers"].values()] == [number] * 3
        assert not torch.equal(patch.feedback("2").abs(), before.abs())
    assert not torch.equal(model[2].weight, weight)


class Pruned(nn.Linear):
    """Changes a copy of its weight in place before it uses it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight[:, 0] = 0
        return F.linear(x, weight, self.bias)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_copy_that_was_changed_in_place_is_a_weight_of_its_own(frozen):
    """V follows the weight in the call, whose pruned column has no sign."""
    model = redrawn(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Pruned(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    model[2].weight.requires_grad_(not frozen)
    sent = []
    patch = feedbackhook.patch(model, "uSF")
    patch.on_error_signal("2", lambda grad_input, grad_output: sent.append((grad_input, grad_output)))
    gradients(model, draw(3, 4))
    ((grad_input, grad_output),) = sent
    v = model[2].weight.detach().sign()
    v[:, 0] = 0
    torch.testing.assert_close(grad_input, grad_output @ v)
    assert not grad_input[:, 0].any()


class Inner(nn.Module):
    """Its first layer's weight meets its input in a function that cannot be rerouted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.inner(x, self.first.weight)))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_what_passes_on_data_is_looked_into_again_on_inputs_that_require_a_gradient(frozen):
    model, x = redrawn(Inner()), draw(3, 4)
    model.requires_grad_(not frozen)
    feedbackhook.patch(model, "sign")
    for _ in range(2):
        model(x)  # nothing lies upstream
    with pytest.raises(feedbackhook.ExactGradientError, match="'first'"):
        model(x.requires_grad_())
