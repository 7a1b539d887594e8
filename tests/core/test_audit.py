"""What becomes of a patched weight that is used a second time, beside the call that is rerouted.

`Twice` runs its layer `b` and then uses its weight again by a function of the table. Each function is
rerouted, refused by name, or no use that an error signal passes; frozen weights, which get no gradient for
the guard to look at, are no exception but for those in a table of their own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_same_gradients, assert_unlike, by_backprop, by_saved_tensors, gradients
from support.problems import (
    MLP_UPSTREAM,
    draw,
    mlp,
    outside_every_forward,
    patched_copy,
    random_feedback,
    redrawn,
)
from torch import Tensor, nn

import feedbackhook
from feedbackhook.core.audit import Finding

SecondUse = Callable[[Tensor, Tensor], Tensor]
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])


class Twice(nn.Module):
    """Three layers, the middle one's weight used again by `second`."""

    def __init__(self, second: SecondUse, frozen: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.requires_grad_(not frozen)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h) + self.second(h, self.b.weight)))


def with_exact_second_use(model: Twice) -> Twice:
    """The same model for the oracle, which then does not know the weight in the second use."""
    twin, second = copy.deepcopy(model), model.second
    twin.second = lambda h, w: second(h, w.clone())
    return twin


def with_rerouted_second_use(model: Twice, v: Tensor) -> Twice:
    """The same model, whose second use computes with W and sends its error signal through V."""
    twin, second = copy.deepcopy(model), model.second

    def straight_through(h: Tensor, w: Tensor) -> Tensor:
        of_v = second(h, v)
        return second(h.detach(), w) + (of_v - of_v.detach())

    twin.second = straight_through
    return twin


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Product(torch.autograd.Function):
    """x @ w.T, as somebody's own function."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


ORDER = torch.tensor([3, 2, 1, 0])
FIRST = torch.zeros(3, 4, dtype=torch.long)

REROUTED: dict[str, SecondUse] = {
    "linear": lambda h, w: F.linear(h, w),
    "linear with .data": lambda h, w: F.linear(h, w.data),
    "linear with .detach()": lambda h, w: F.linear(h, w.detach()),
    "linear with a view of a detached view": lambda h, w: F.linear(h, w[:].detach().t()),
    "linear with the transposed, copied": lambda h, w: F.linear(h, w.t().contiguous()),
    "linear with the transposed, reshaped": lambda h, w: F.linear(h, w.t().reshape(4, 4)),
    "linear with rows": lambda h, w: F.linear(h, w[ORDER]),
    "linear with a view of rows": lambda h, w: F.linear(h, w[ORDER].t()),
    "linear with index_select": lambda h, w: F.linear(h, w.index_select(0, ORDER)),
    "linear with a clone": lambda h, w: F.linear(h, w.clone()),
    "linear with a flip": lambda h, w: F.linear(h, w.flip(0)),
    "addmm": lambda h, w: torch.addmm(h.new_zeros(4), h, w.t(), alpha=2.0),
    "convolution": lambda h, w: F.conv1d(h[..., None], w[..., None]).flatten(1),
    "transposed convolution": lambda h, w: F.conv_transpose1d(h[..., None], w.t()[..., None]).flatten(1),
}

REFUSED: dict[str, SecondUse] = {
    "matmul": lambda h, w: h @ w.T,
    "matmul of rows": lambda h, w: h @ w[ORDER].T,
    "matmul with .data": lambda h, w: h @ w.data.T,
    "matmul with .detach()": lambda h, w: h @ w.detach().T,
    "matmul with a detached view": lambda h, w: h @ w[:].detach().T,
    "aten.mm": lambda h, w: torch.ops.aten.mm(h, w.t()),
    "bmm": lambda h, w: torch.bmm(h[None], w.T[None])[0],
    "baddbmm": lambda h, w: torch.baddbmm(h.new_zeros(1, 3, 4), h[None], w.T[None])[0],
    "mv": lambda h, w: torch.stack([torch.mv(w, row) for row in h]),
    "addmv": lambda h, w: torch.stack([torch.addmv(h.new_zeros(4), w, row) for row in h]),
    "dot": lambda h, w: torch.stack([torch.stack([row.dot(r) for r in w]) for row in h]),
    "inner": torch.inner,
    "einsum": lambda h, w: torch.einsum("ni,oi->no", h, w),
    "tensordot": lambda h, w: torch.tensordot(h, w, dims=([1], [1])),
    "multi_dot": lambda h, w: torch.linalg.multi_dot([h, w, w]),
    "vecdot": lambda h, w: torch.linalg.vecdot(h[:, None], w[None]),
    "kron": lambda h, w: torch.kron(h, w)[:3, :4],
    "bilinear": lambda h, w: F.bilinear(h, h, w[None]).expand(3, 4),
    "cdist": torch.cdist,
    "solve": lambda h, w: torch.linalg.solve(w, h.T).T,
    "attention": lambda h, w: F.scaled_dot_product_attention(h[None], w[None], w[None])[0],
    "product and sum": lambda h, w: (h.unsqueeze(1) * w).sum(-1),
    "lerp": lambda h, w: torch.lerp(h, h * 2, w[:3]),
    "linear with the weight as input": lambda h, w: F.linear(w, h).t(),
    "convolution with the weight as input": lambda h, w: F.conv1d(w[..., None], h[..., None])[..., 0].t(),
    "weighted look-up": lambda h, w: F.embedding_bag(
        ORDER.expand(3, 4), w, per_sample_weights=h.softmax(1), mode="sum"
    ),
    "a function of one's own": Product.apply,
}

OUT_OF_SIGHT_WHERE_FROZEN: dict[str, SecondUse] = {
    "matmul of the normalized": lambda h, w: h @ F.normalize(w).T,
    "matmul of the softmax": lambda h, w: h @ w.softmax(-1).T,
    "einsum of the scaled": lambda h, w: torch.einsum("ni,oi->no", h, w * 2.0),
    "cosine similarity": lambda h, w: F.cosine_similarity(h[:, None], w[None], dim=-1),
    "gathered entries": lambda h, w: h * w.gather(0, FIRST),
    "squared distance": lambda h, w: ((h[:, None] - w[None]) ** 2).sum(-1),
    "squared difference": lambda h, w: (h - w[:3]) ** 2,
}

OF_UNKNOWN_ORIGIN_WHERE_FROZEN: dict[str, SecondUse] = {
    "linear of the scaled": lambda h, w: F.linear(h, w * 2),
    "convolution of a product": lambda h, w: F.conv1d(h[..., None], (w * 1)[..., None]).flatten(1),
}

NO_USE: dict[str, SecondUse] = {
    "sum added": lambda h, w: h + w.sum(),
    "added": lambda h, w: h + w[:3],
    "concatenated": lambda h, w: torch.cat([h, w])[:3],
    "norm as a scale": lambda h, w: h * w.norm(),
    "mean of the sizes as a scale": lambda h, w: h / w.abs().mean(1).sum(),
}


@FROZEN
@pytest.mark.parametrize("second", REROUTED.values(), ids=REROUTED)
def test_a_second_use_is_rerouted_with_the_same_part_of_v(second, frozen):
    plain, x = redrawn(Twice(second, frozen)), draw(3, 4)
    model, feedback = patched_copy(plain)
    want = by_saved_tensors(with_rerouted_second_use(plain, feedback["b"]), feedback, x)
    half_exact = by_saved_tensors(with_exact_second_use(plain), feedback, x)
    with no_warning():
        got = gradients(model, x)
    assert torch.equal(got.output, by_backprop(plain, x).output)
    assert_same_gradients(got, want)
    assert_unlike(got, half_exact, ["input", "a.weight"])


@FROZEN
@pytest.mark.parametrize("second", REFUSED.values(), ids=REFUSED)
def test_a_second_use_that_cannot_be_rerouted_is_refused_each_time(second, frozen):
    model, x = redrawn(Twice(second, frozen)), draw(3, 4)
    patch = feedbackhook.patch(model)
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match=r"weight of 'b'.*exclude=\['b'\]"):
            model(x)
        assert torch._C._len_torch_function_stack() == 0
    patch.enabled = False
    model(x).sum().backward()


@pytest.mark.parametrize(
    "second",
    (unseen := OUT_OF_SIGHT_WHERE_FROZEN | OF_UNKNOWN_ORIGIN_WHERE_FROZEN).values(),
    ids=unseen,
)
def test_a_second_use_of_what_was_computed_from_a_trainable_weight_is_refused(second):
    model = redrawn(Twice(second))
    feedbackhook.patch(model)
    with pytest.raises(feedbackhook.ExactGradientError, match=r"weight of 'b'"):
        model(draw(3, 4))


@pytest.mark.parametrize("second", OUT_OF_SIGHT_WHERE_FROZEN.values(), ids=OUT_OF_SIGHT_WHERE_FROZEN)
def test_what_was_computed_from_a_frozen_weight_is_out_of_sight_and_exact(second):
    """A known limit: the graph has no trace of it."""
    plain, x = redrawn(Twice(second, frozen=True)), draw(3, 4)
    model, feedback = patched_copy(plain)
    with no_warning():
        got = gradients(model, x)
    assert_same_gradients(got, by_saved_tensors(with_exact_second_use(plain), feedback, x))
    assert feedbackhook.get_patch(model).audit(model(x)) == []


@pytest.mark.parametrize(
    "second", OF_UNKNOWN_ORIGIN_WHERE_FROZEN.values(), ids=OF_UNKNOWN_ORIGIN_WHERE_FROZEN
)
def test_a_layers_function_says_once_that_its_weight_is_of_unknown_origin(second):
    plain, x = redrawn(Twice(second, frozen=True)), draw(3, 4)
    model, feedback = patched_copy(plain)
    with pytest.warns(UserWarning, match=r"of unknown origin.*frozen weight of 'b'") as said:
        got = gradients(model, x)
    assert len(said) == 1
    assert_same_gradients(got, by_saved_tensors(with_exact_second_use(plain), feedback, x))
    with no_warning():
        output = model(x)
    assert feedbackhook.get_patch(model).audit(output) == []


@FROZEN
@pytest.mark.parametrize("second", NO_USE.values(), ids=NO_USE)
def test_what_no_error_signal_passes_is_let_through(second, frozen):
    plain, x = redrawn(Twice(second, frozen)), draw(3, 4)
    model, feedback = patched_copy(plain)
    with no_warning():
        got = gradients(model, x)
    assert_same_gradients(got, by_saved_tensors(with_exact_second_use(plain), feedback, x))
    assert_unlike(got, by_backprop(plain, x), ["input", "a.weight"])
    assert feedbackhook.get_patch(model).audit(model(x)) == []


@FROZEN
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=["vector", "batch", "sequences"])
@pytest.mark.parametrize("first", ["all", "bias alone", "weight alone"])
def test_what_a_layer_makes_of_data_is_an_activation_whichever_of_its_parameters_learn(first, shape, frozen):
    """Data leave no trace in the graph, and a frozen weight none either: the layer itself must be known."""
    model = redrawn(Twice(torch.inner, frozen))
    model.a.weight.requires_grad_(first != "bias alone")
    model.a.bias.requires_grad_(first != "weight alone")
    feedbackhook.patch(model)
    with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'b'"):
        model(draw(*shape))


# --- when it looks ---------------------------------------------------------------------------------------


class InnerLater:
    """The inner product with the weight, from the second call on."""

    calls = 0

    def __call__(self, h: Tensor, w: Tensor) -> Tensor:
        self.calls += 1
        return torch.inner(h, w) if self.calls > 1 else h


@FROZEN
def test_a_forward_that_takes_another_path_than_before_is_looked_into(frozen):
    model, x = redrawn(Twice(InnerLater(), frozen)), draw(3, 4)
    feedbackhook.patch(model)
    model(x).sum().backward()
    with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'b'"):
        model(x)


class Evaluated(nn.Module):
    """Calls one function in both modes, but multiplies by a patched weight in one of them alone."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.a, self.b, self.mode = nn.Linear(4, 4), nn.Linear(4, 4), mode

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.mul(h, self.b.weight if self.training is self.mode else h))


@FROZEN
@pytest.mark.parametrize("mode", [True, False], ids=["in training", "in evaluation"])
def test_a_change_of_training_mode_is_looked_into(mode, frozen):
    model, x = redrawn(Evaluated(mode)), draw(4, 4)
    model.b.requires_grad_(not frozen)
    patch = feedbackhook.patch(model)
    model.train(not mode)
    model(x).sum().backward()
    model.train(mode)
    for _ in range(2):
        with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'b'"):
            model(x)
    model.train(not mode)
    assert patch.audit(model(x)) == []


def test_a_function_that_passed_is_looked_into_again_after_an_error():
    """What was known is forgotten: the same function, now with a weight, is no longer taken for known."""

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.exact = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.mul(h, self.b.weight if self.exact else h))

    model, x = redrawn(Switched()), draw(4, 4).requires_grad_()
    patch = feedbackhook.patch(model)
    gradients(model, x)
    model.exact = True
    output = model(x)  # `mul` passed before, so that this is found on request alone
    assert patch.audit(output) == [Finding("b", True, (4, 4), "MulBackward0")]
    with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'a'"):
        F.linear(x, model.a.weight).sum().backward()
    with pytest.raises(feedbackhook.ExactGradientError, match="weight of 'b'"):
        model(x)


# --- on request ------------------------------------------------------------------------------------------


def test_an_audit_on_request_finds_each_layer_of_a_plain_graph():
    model, x = mlp(), draw(3, 4).requires_grad_()
    patch = feedbackhook.patch(model)
    assert patch.audit(model(x)) == []
    patch.enabled = False
    findings = patch.audit({"loss": [model(x).sum()]})
    assert findings == [
        Finding(name, True, tuple(model[int(name)].weight.shape), "AddmmBackward0")
        for name in ("0", "2", "4")
    ]
    assert [finding.name for finding in patch.audit(model(x.detach()))] == ["2", "4"]
    patch.enabled = True
    assert [f.name for f in patch.audit(outside_every_forward(model, x))] == ["0", "2"]


@pytest.mark.parametrize("output", ["no grad", "detached", "no tensor"])
def test_an_audit_of_what_has_no_graph_is_an_error(output):
    model, x = mlp(), draw(3, 4)
    patch = feedbackhook.patch(model)
    with torch.no_grad():
        without = model(x)
    given = {"no grad": without, "detached": (model(x).detach(),), "no tensor": None}[output]
    with pytest.raises(ValueError, match="the output has no graph"):
        patch.audit(given)


def test_no_audit_changes_the_gradients():
    plain, x = mlp(), draw(3, 4)
    model, feedback = patched_copy(plain)
    patch = feedbackhook.get_patch(model)

    def audited(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        patch.audit(output)
        return output

    got = gradients(model, x, audited)
    assert_same_gradients(got, by_saved_tensors(plain, feedback, x))
    assert_unlike(got, by_backprop(plain, x), MLP_UPSTREAM)


# --- what has nothing to hide ----------------------------------------------------------------------------


class Language(nn.Module):
    """A tied embedding, positions, a norm and a layer scale around two layers, and a scale of W's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.positions, self.gamma = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.ones(4))
        self.wide_gamma = nn.Parameter(torch.ones(5, 4))
        self.norm, self.batch_norm = nn.LayerNorm((5, 4)), nn.BatchNorm1d(5)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens) + self.positions
        branch = self.down(torch.tanh(self.up(self.batch_norm(self.norm(h)))))
        h = h + self.gamma * branch + self.wide_gamma * branch / self.up.weight.detach().norm()
        return self.head(F.rms_norm(h, (4,), self.gamma))


@FROZEN
def test_embeddings_norms_scales_and_positions_are_no_finding(frozen):
    plain, tokens = redrawn(Language()), torch.tensor([[0, 1, 2, 3, 4], [6, 5, 4, 3, 3]])
    if frozen:
        for part in (plain.up, plain.norm, plain.batch_norm):
            part.requires_grad_(False)
    feedback = random_feedback(plain)
    model = copy.deepcopy(plain)
    patch = feedbackhook.patch(model, "tensor", feedback=feedback)
    with no_warning():
        got = gradients(model, tokens, input_requires_grad=False)
        assert patch.audit(model(tokens)) == []
    want = by_saved_tensors(plain, feedback, tokens, input_requires_grad=False)
    assert_same_gradients(got, want)
    exact = by_backprop(plain, tokens, input_requires_grad=False)
    assert_unlike(got, exact, ["words.weight", "positions", "gamma"])
