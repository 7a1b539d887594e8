"""Uses of a weight that are easily overlooked: in later steps, by layers that store it in their own way, in
memory that several weights share, and of weights alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_backward_hooks,
    by_saved_tensors,
    gradients,
)
from support.problems import draw, patched_copy, redrawn
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import feedbackhook


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def net(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), middle, nn.Tanh(), nn.Linear(4, 3))


# --- functions that the module has called before -----------------------------------------------------------


class Later(nn.Linear):
    """Has called F.linear and matrix products, and detached its weight, and uses it by `second` once `on`."""

    on = False
    second: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        h = (
            h
            + 0 * (h @ h.t() @ h)
            + 0 * torch.mm(h, torch.mm(h.t(), h))
            + 0 * self.weight.detach().data.sum()
        )
        return h + self.second(x, self.weight) if self.on else h


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    "second",
    [
        lambda h, w: h @ w.t(),
        lambda h, w: h @ w.detach().t(),
        lambda h, w: h @ w.data.t(),
        lambda h, w: F.linear(w, h).t(),
        lambda h, w: F.linear(w.detach(), h).t(),
        lambda h, w: torch.mm(w.data, h.t()).t(),
    ],
    ids=["matmul", "detached", "data", "as input", "detached as input", "data first"],
)
def test_a_product_is_refused_in_later_steps_too(second, frozen):
    layer = Later(4, 4)
    layer.second = second
    layer.weight.requires_grad_(not frozen)
    model, x = redrawn(net(layer)), draw(3, 4)
    feedbackhook.patch(model)
    for _ in range(2):
        model(x).square().sum().backward()
    layer.on = True
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"weight of '2'.*exclude=\['2'\]"):
            model(x)


# --- weights alone -----------------------------------------------------------------------------------------


class Penalized(nn.Module):
    """Computes a penalty on a weight inside its forward."""

    def __init__(self, penalty: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(2, 2, 3)
        self.penalty = penalty

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(torch.tanh(self.a(x))), self.penalty(self.b.weight, self.c.weight).square().sum()


@pytest.mark.parametrize(
    "penalty",
    [
        lambda b, c: F.linear(b, b) - torch.eye(4),
        lambda b, c: F.linear(b, b.t()),
        lambda b, c: torch.addmm(torch.eye(4).to(b), b, b.t(), beta=-1),
        lambda b, c: F.conv2d(c, c, padding=2),
        lambda b, c: b @ b.t() - torch.eye(4),
    ],
    ids=["linear", "linear of the transposed", "addmm", "conv2d", "matmul"],
)
def test_a_penalty_inside_the_forward_has_its_own_gradient(penalty):
    """No error signal passes it, so V has no part in it."""
    plain, x = redrawn(Penalized(penalty)), draw(3, 4)
    model, _ = patched_copy(plain)
    wanted, got = plain(x)[1], model(x)[1]
    wanted.backward()
    got.backward()
    assert torch.equal(got, wanted)
    for name, parameter in plain.named_parameters():
        other = model.get_parameter(name).grad
        assert (parameter.grad is None) is (other is None), name
        if other is not None:
            torch.testing.assert_close(other, parameter.grad)


class Merged(nn.Module):
    """Multiplies two weights before it applies them."""

    def __init__(self, merge: Callable[[nn.Linear, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(3, 4)
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merge(self.a, self.b))


@pytest.mark.parametrize(
    "merge",
    [
        lambda a, b: F.linear(b.weight, a.weight.t()),
        lambda a, b: b(a.weight.t()).t(),
        lambda a, b: b.weight @ a.weight,
        lambda a, b: torch.addmm(b.weight.new_zeros(4, 4), b.weight, a.weight),
        lambda a, b: F.linear(2 * b.weight, a.weight.t()),
        lambda a, b: F.linear(F.normalize(b.weight), a.weight.t()),
        lambda a, b: b(2 * a.weight.t()).t(),
    ],
    ids=["linear", "module", "matmul", "addmm", "scaled", "normalized", "module of the scaled"],
)
def test_merged_weights_are_refused_where_they_meet_an_activation(merge):
    model = redrawn(nn.Sequential(nn.Linear(4, 4), Merged(merge)))
    feedbackhook.patch(model)
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"weight of '1\.[ab]'"):
            model(draw(3, 4))


class Applied(nn.Module):
    """Applies a layer to the weight of another, as to data."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Linear(4, 3), nn.Linear(4, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(self.table.weight))) + x.sum()


def test_a_layer_that_is_applied_to_the_weight_of_another_is_rerouted():
    """The oracle of saved tensors would take the saved input for a weight."""
    plain, x = redrawn(Applied()), draw(3, 4)
    model, feedback = patched_copy(plain)
    got = gradients(model, x)
    assert_same_gradients(got, by_backward_hooks(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["table.weight", "a.weight"])


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_function_of_ones_own_in_compiled_code_is_no_layer():
    """With this backend its node has the name that an edge has there, but a single input."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubling.apply(x)

    plain, x = redrawn(net(Own())), draw(3, 4)
    model, feedback = patched_copy(plain)
    model[2] = torch.compile(model[2], backend="eager")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of the compiler
    got = gradients(model, x)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight"])


# --- further matrices of a layer ---------------------------------------------------------------------------


class Adapted(nn.Linear):
    """Has matrices of its own beside its weight, as the layers of loralib have."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.lora_a, self.lora_b = nn.Parameter(draw(2, size)), nn.Parameter(draw(size, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.t() @ self.lora_b.t()


class Doubled(nn.Linear):
    """Has a second weight of the shape of the first."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.extra = nn.Parameter(draw(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.matmul(x, self.extra)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    ("kind", "names"),
    [(Adapted, r"'2\.lora_a' .*'2\.lora_b'"), (Doubled, r"'2\.extra'")],
    ids=["adapted", "doubled"],
)
def test_further_matrices_of_a_layer_are_named(kind, names, frozen):
    model, x = redrawn(net(kind(4))), draw(3, 4)
    for name, parameter in model[2].named_parameters():
        parameter.requires_grad_(not frozen or name in ("weight", "bias"))
    feedbackhook.patch(model)
    with pytest.warns(UserWarning, match=rf"belong to no layer that can be patched.*: {names}"):
        model(x)
    model(x).sum().backward()  # and once is enough


def test_an_excluded_layer_may_have_any_matrices():
    model = redrawn(net(Adapted(4)))
    feedbackhook.patch(model, exclude=["2"])
    model(draw(3, 4)).sum().backward()


def test_a_weighted_look_up_in_a_table_of_no_layer_is_named():
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.values, self.out = (
                nn.Linear(4, 5),
                nn.EmbeddingBag(5, 4, mode="sum"),
                nn.Linear(4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            weights, places = self.score(x).softmax(1).topk(2)
            return self.out(self.values(places, per_sample_weights=weights))

    model = redrawn(Memory())
    feedbackhook.patch(model)
    with pytest.warns(UserWarning, match=r"belong to no layer that can be patched.*'values.weight'"):
        model(draw(3, 4))


# --- weights that are no parameters ------------------------------------------------------------------------


class Buffered(nn.Linear):
    """Keeps its weight as a buffer."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        weight = self.weight.detach().clone()
        del self.weight
        self.register_buffer("weight", weight)


class OfMatmul(Buffered):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Dequantized(nn.Linear):
    """Computes its weight from a buffer at each access."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        weight = self.weight.detach()
        del self._parameters["weight"]
        self.register_buffer("levels", (100 * weight).round())

    @property
    def weight(self) -> Tensor:
        return self.levels / 100

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.t()) + self.bias


@pytest.mark.parametrize("kind", [OfMatmul, Dequantized], ids=["buffer", "property"])
def test_a_weight_that_is_no_parameter_is_refused_in_a_product(kind):
    model, x = redrawn(net(kind(4))), draw(3, 4)
    feedbackhook.patch(model)
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"'2'.*exclude=\['2'\]"):
            model(x)


class ByParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Buffered(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


@pytest.mark.parametrize("middle", [Buffered(4), ByParent()], ids=["itself", "parent"])
def test_a_weight_that_is_a_buffer_is_rerouted_in_a_layers_function(middle):
    plain, x = redrawn(net(middle)), draw(3, 4)
    model, feedback = patched_copy(plain)
    got = gradients(model, x)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight"])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_layer_with_a_derived_weight_may_skip_its_computation(frozen):
    class Skipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    layer = nn.utils.parametrizations.weight_norm(Skipped(4, 4)).requires_grad_(not frozen)
    model = redrawn(net(layer))
    feedbackhook.patch(model)
    model(draw(3, 4)).sum().backward()


# --- its own weight, out of the graph ----------------------------------------------------------------------


class Scaled(nn.Linear):
    """Learns a scale of its weight, which stays as it is."""

    def __init__(self, size: int, shape: tuple[int, ...], binary: bool) -> None:
        super().__init__(size, size)
        self.scale, self.binary = nn.Parameter(torch.ones(shape)), binary

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.sign() if self.binary else self.weight
        return F.linear(x, weight.detach() * self.scale, self.bias)


@pytest.mark.parametrize("binary", [False, True], ids=["weight", "signs"])
@pytest.mark.parametrize("shape", [(1,), (4,), (4, 1)], ids=["number", "vector", "column"])
def test_a_detached_weight_with_a_learned_scale_is_rerouted(shape, binary):
    plain, x = redrawn(net(Scaled(4, shape, binary))), draw(3, 4)
    model, _ = patched_copy(plain)
    got = gradients(model, x)
    (row,) = [row for row in feedbackhook.get_patch(model).layers if row.name == "2"]
    assert (row.calls, row.rerouted) == (1, 1)
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight"])


# --- memory that several parameters share ------------------------------------------------------------------


def flattened(model: nn.Module) -> nn.Module:
    """Put all parameters into one storage."""
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    return model


def test_parameters_in_one_storage_are_told_apart():
    layers = [
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.Tanh(),
        nn.Linear(4, 4),
        nn.Tanh(),
        nn.Linear(4, 3, bias=False),
    ]
    plain, x = redrawn(nn.Sequential(*layers)), draw(3, 4)
    model, feedback = patched_copy(plain)
    got = gradients(flattened(model), x)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "0.weight"])


@pytest.mark.parametrize("flat", [False, True], ids=["own storages", "one storage"])
def test_a_frozen_weight_in_one_storage_with_others_is_found(flat):
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.b.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cdist(self.a(x), self.b.weight))

    model = redrawn(Prototypes())
    feedbackhook.patch(flattened(model) if flat else model)
    with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'b'"):
        model(draw(3, 4))


# --- parameters whose contents are swapped -----------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True], ids=["copied", "swapped"])
def test_the_guard_stays_when_a_state_is_loaded(swap):
    model, x = redrawn(net(nn.Linear(4, 4))), draw(3, 4)
    feedbackhook.patch(model)
    state = copy.deepcopy(model.state_dict())
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    model(x).sum().backward()
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match="weight of '2'"):
            F.linear(torch.tanh(model[0](x)), model[2].weight).sum().backward()
    feedbackhook.get_patch(model).remove()
    F.linear(torch.tanh(model[0](x)), model[2].weight).sum().backward()
