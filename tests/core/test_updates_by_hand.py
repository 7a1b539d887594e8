"""Rules that wait for optimizer steps: whoever updates weights without one is told so, once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from support.oracle import probe
from support.problems import draw, mlp
from torch import Tensor, nn

import feedbackhook

Update = Callable[[list[nn.Parameter]], None]


def in_place(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for p in parameters:
            p -= 0.1 * p.grad


def of_data(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.data.add_(p.grad, alpha=-0.1)


def of_master_copies(parameters: list[nn.Parameter]) -> None:
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for master, p in zip(copies, parameters, strict=True):
        master.grad = p.grad
    torch.optim.SGD(copies, lr=0.1).step()
    with torch.no_grad():
        for master, p in zip(copies, parameters, strict=True):
            p.copy_(master)


def nothing(parameters: list[nn.Parameter]) -> None:
    pass


UPDATES = {"in place": in_place, "data": of_data, "master copies": of_master_copies}
REDRAW = r"the weight of '0' is updated .* call patch\.redraw\(\) after each update"
LEARN = r"the weight of '0' is updated .* pass patch\.parameters\(\) to an optimizer"
MIRROR = r"the weight of '0' is updated .* call patch\.mirror\(\) after updates"
WAITING = {
    "brSF": ("brSF", {}, REDRAW),
    "noise": ("noise", {"redraw": "update"}, REDRAW),
    "KP": ("KP", {}, LEARN),
    "WM": ("WM", {"every": 1}, MIRROR),
    "DKP": ("DKP", {}, LEARN),
}


def said(
    model: nn.Module, update: Update, steps: int = 3, after: Callable[[], None] | None = None
) -> list[str]:
    parameters, x = list(model.parameters()), draw(3, 4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            model.zero_grad()
            probe(model(x)).backward()
            update(parameters)
            if after is not None:
                after()
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize(("mode", "options", "text"), WAITING.values(), ids=WAITING)
def test_an_update_without_an_optimizer_is_told_of_once(mode, options, text, update):
    model = mlp()
    feedbackhook.patch(model, mode, **options)
    (message,) = said(model, update, steps=4)
    with pytest.raises(UserWarning, match=text):
        raise UserWarning(message)


@pytest.mark.parametrize("mode", ["uSF", "random", "symmetric", "DFA", "WM"])
def test_rules_that_do_not_wait_say_nothing(mode):
    model = mlp()
    feedbackhook.patch(model, mode, **({"every": None} if mode == "WM" else {}))
    assert said(model, in_place) == []


@pytest.mark.parametrize("mode", ["brSF", "KP", "WM"])
def test_an_optimizer_is_never_told_of_even_if_updates_by_hand_follow(mode):
    model = mlp()
    patch = feedbackhook.patch(model, mode, **({"every": 2} if mode == "WM" else {}))
    learned = [] if mode == "WM" else list(patch.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), *learned], lr=0.01)
    assert said(model, lambda parameters: optimizer.step()) == []
    assert said(model, in_place) == []


def test_an_optimizer_of_other_weights_does_not_count():
    model = mlp()
    feedbackhook.patch(model, "brSF", include=["0", "2"])
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.01)

    def update(parameters: list[nn.Parameter]) -> None:
        optimizer.step()
        in_place(parameters)

    assert len(said(model, update)) == 1


def test_what_the_warning_asks_for_silences_it():
    model = mlp()
    patch = feedbackhook.patch(model, "brSF")
    assert said(model, in_place, after=patch.redraw) == []
    model = mlp()
    patch = feedbackhook.patch(model, "WM", every=5)
    assert said(model, in_place, after=patch.mirror) == []
    model = mlp()
    patch = feedbackhook.patch(model, "KP")
    optimizer = torch.optim.SGD(patch.parameters(), lr=0.01)
    assert said(model, in_place, after=optimizer.step) == []


def test_weights_that_are_loaded_before_the_first_backward_are_no_update():
    model = mlp()
    feedbackhook.patch(model, "brSF")
    x = draw(3, 4)
    for factor in (2.0, 3.0):
        model(x)
        model.load_state_dict({name: factor * tensor for name, tensor in model.state_dict().items()})
    assert said(model, nothing) == []


def test_weights_that_are_loaded_after_a_backward_are_no_update():
    """As after a step that only warms up, or one that is undone."""
    model = mlp()
    feedbackhook.patch(model, "brSF")
    state = {name: 2.0 * tensor for name, tensor in model.state_dict().items()}
    assert said(model, lambda parameters: model.load_state_dict(state) and None) == []


def test_optimizers_that_move_weights_before_their_first_step_is_over_are_none_by_hand():
    """SAM climbs by a method of its own; L-BFGS runs forwards in its step."""
    model, x = mlp(), draw(3, 4)
    feedbackhook.patch(model, "brSF")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def by_halves(parameters: list[nn.Parameter]) -> None:
        in_place(parameters)
        probe(model(x)).backward()
        optimizer.step()

    assert said(model, by_halves) == []
    other = mlp()
    feedbackhook.patch(other, "brSF")
    lbfgs = torch.optim.LBFGS(other.parameters(), max_iter=5)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = probe(other(x))
        loss.backward()
        return loss

    assert said(other, lambda parameters: lbfgs.step(closure) and None) == []


def test_backwards_without_an_update_say_nothing():
    model = mlp()
    feedbackhook.patch(model, "brSF")
    assert said(model, nothing) == []


def test_a_copy_looks_for_itself():
    model = mlp()
    feedbackhook.patch(model, "brSF")
    assert len(said(model, in_place)) == 1
    twin = copy.deepcopy(model)
    assert said(model, in_place) == []
    assert len(said(twin, in_place)) == 1


def test_frozen_weights_are_not_looked_at():
    model = mlp()
    feedbackhook.patch(model, "brSF")
    model.requires_grad_(False)
    leaf: Tensor = draw(3, 4).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            probe(model(leaf)).backward()
            for p in model.parameters():
                p.data.add_(1.0)
