"""The oracles themselves: against a chain rule written out by hand, against each other, and against backprop.

The hand-written rule knows a layer only as a list of taps `(output entry, input entry, weight entry)`, made
by explicit loops. With `y[o] += W[w] x[i]` over all taps, learning with V is `dE/dx[i] += V[w] dE/dy[o]` and
`dE/dW[w] += x[i] dE/dy[o]`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import (
    ORACLES,
    TOLERANCE,
    Gradients,
    assert_matches_oracle,
    assert_same_gradients,
    assert_unlike,
    by_backprop,
    by_backward_hooks,
    by_saved_tensors,
    call,
    gradients,
    literal_backward_hooks,
    swapped_saved_tensors,
)
from support.problems import PROBLEMS, Net, draw, mlp, random_feedback, redrawn
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# --- a chain rule written out by hand --------------------------------------------------------------------


def read_index(position: int, size: int, mode: str) -> int | None:
    """The entry that padding puts at `position`, which may lie outside `0 .. size - 1`; None is a zero."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return 0 if position < 0 else size - 1
    if mode == "circular":
        return position % size
    return -position if position < 0 else 2 * (size - 1) - position


def conv_pairs(layer: nn.Module, axis: int, size: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Output size and (output, input, kernel) positions along one axis of a convolution."""
    k, s, d = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    if layer.padding == "valid":
        left = right = 0
    elif layer.padding == "same":
        left = d * (k - 1) // 2
        right = d * (k - 1) - left
    else:
        left = right = layer.padding[axis]
    out = (size + left + right - d * (k - 1) - 1) // s + 1
    reads = [
        (o, read_index(o * s + t * d - left, size, layer.padding_mode), t)
        for o in range(out)
        for t in range(k)
    ]
    return out, [read for read in reads if read[1] is not None]


def conv_transpose_pairs(layer: nn.Module, axis: int, size: int) -> tuple[int, list[tuple[int, int, int]]]:
    """The same for a transposed convolution: each input entry is written to k output entries."""
    k, s, d, p = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis], layer.padding[axis]
    out = (size - 1) * s - 2 * p + d * (k - 1) + layer.output_padding[axis] + 1
    writes = [(i * s + t * d - p, i, t) for i in range(size) for t in range(k)]
    return out, [write for write in writes if 0 <= write[0] < out]


@dataclass
class Taps:
    """A layer without its weight: the shape of its output, and flat indices of one batch entry."""

    output_shape: tuple[int, ...]
    outputs: Tensor
    inputs: Tensor
    weights: Tensor

    @classmethod
    def of(cls, layer: nn.Module, shape: tuple[int, ...]) -> Taps:
        """`shape` is the input's, without the batch."""
        if isinstance(layer, nn.Linear):
            triples = list(itertools.product(range(layer.out_features), range(layer.in_features)))
            o, i = torch.tensor(triples).T
            return cls((layer.out_features,), o, i, o * layer.in_features + i)
        transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        pairs = conv_transpose_pairs if transposed else conv_pairs
        axes = [pairs(layer, axis, size) for axis, size in enumerate(shape[1:])]
        output_shape = (layer.out_channels, *(out for out, _ in axes))
        per_group = (layer.out_channels // layer.groups, layer.in_channels // layer.groups)
        triples = []
        for group, oc, ic in itertools.product(range(layer.groups), *map(range, per_group)):
            o_channel, i_channel = group * per_group[0] + oc, group * per_group[1] + ic
            w_channels = (i_channel, oc) if transposed else (o_channel, ic)
            for along in itertools.product(*(pairs_of_axis for _, pairs_of_axis in axes)):
                o, i, t = zip(*along, strict=True)
                triples.append(
                    (
                        flat_index((o_channel, *o), output_shape),
                        flat_index((i_channel, *i), shape),
                        flat_index((*w_channels, *t), tuple(layer.weight.shape)),
                    )
                )
        return cls(output_shape, *torch.tensor(triples).T)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = torch.zeros(len(x), torch.Size(self.output_shape).numel(), dtype=x.dtype)
        flat.index_add_(1, self.outputs, x.flatten(1)[:, self.inputs] * weight.flatten()[self.weights])
        y = flat.reshape(-1, *self.output_shape)
        return y if bias is None else y + bias.reshape(-1, *[1] * (len(self.output_shape) - 1))

    def input_gradient(self, error: Tensor, v: Tensor, x: Tensor) -> Tensor:
        flat = torch.zeros_like(x).flatten(1)
        flat.index_add_(1, self.inputs, error.flatten(1)[:, self.outputs] * v.flatten()[self.weights])
        return flat.reshape(x.shape)

    def weight_gradient(self, error: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        products = (error.flatten(1)[:, self.outputs] * x.flatten(1)[:, self.inputs]).sum(0)
        return (
            torch.zeros(weight.numel(), dtype=x.dtype)
            .index_add_(0, self.weights, products)
            .reshape(weight.shape)
        )


def flat_index(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    flat = 0
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return flat


@torch.no_grad()
def chain_rule(model: nn.Sequential, feedback: dict[str, Tensor], x: Tensor) -> Gradients:
    """Layers that alternate with tanh, on a batch `[N, ...]`: `dE/dX = V^T (1 - tanh(N)^2) dE/dY` by hand."""
    layers = [(name, module) for name, module in model.named_children() if not isinstance(module, nn.Tanh)]
    taps, seen, activity = {}, {}, x
    for name, layer in layers:
        seen[name] = activity
        taps[name] = Taps.of(layer, tuple(activity.shape[1:]))
        net = taps[name].forward(activity, layer.weight, layer.bias)
        activity = torch.tanh(net)
    output = net

    slopes = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    error = slopes + output
    parameters = {}
    for name, layer in reversed(layers):
        parameters[f"{name}.weight"] = taps[name].weight_gradient(error, seen[name], layer.weight)
        if layer.bias is not None:
            parameters[f"{name}.bias"] = error.flatten(2).sum((0, 2)) if error.dim() > 2 else error.sum(0)
        signal = taps[name].input_gradient(error, feedback[name], seen[name])
        error = signal * (1 - seen[name] ** 2)  # seen is tanh(N) of the layer below
    return Gradients(output, signal, parameters)


def conv_net(layer: nn.Module) -> nn.Sequential:
    """`layer` between two others that are written out by hand as well."""
    pointwise = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[layer.weight.dim()]
    return redrawn(
        nn.Sequential(
            pointwise(2, layer.in_channels, 1),
            nn.Tanh(),
            layer,
            nn.Tanh(),
            pointwise(layer.out_channels, 2, 1),
        )
    )


HAND_WRITTEN = {
    "mlp": (mlp, (5, 4)),
    "conv1d": (lambda: conv_net(nn.Conv1d(2, 3, 3)), (2, 2, 6)),
    "conv1d, even kernel, same": (lambda: conv_net(nn.Conv1d(2, 3, 4, padding="same")), (2, 2, 6)),
    "conv2d": (lambda: conv_net(nn.Conv2d(2, 3, 3)), (2, 2, 5, 6)),
    "conv2d, stride leaves entries unread": (
        lambda: conv_net(nn.Conv2d(2, 3, (2, 3), stride=(3, 2), padding=(0, 1), bias=False)),
        (2, 2, 7, 6),
    ),
    "conv2d, groups and dilation": (
        lambda: conv_net(nn.Conv2d(4, 6, 2, dilation=(2, 1), groups=2)),
        (2, 2, 5, 4),
    ),
    **{
        f"conv2d, {mode}": (
            lambda mode=mode: conv_net(nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode=mode)),
            (2, 2, 4, 5),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d, circular, even kernel, same": (
        lambda: conv_net(nn.Conv2d(2, 2, (2, 4), padding="same", padding_mode="circular")),
        (2, 2, 4, 5),
    ),
    "conv3d": (lambda: conv_net(nn.Conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1), padding=1)), (2, 2, 3, 4, 3)),
    "conv_transpose1d": (lambda: conv_net(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)), (2, 2, 4)),
    "conv_transpose2d, groups": (
        lambda: conv_net(nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, output_padding=1)),
        (2, 2, 3, 4),
    ),
    "conv_transpose2d, output padding beyond the stride": (
        lambda: conv_net(nn.ConvTranspose2d(2, 3, 2, stride=(1, 2), dilation=3, padding=1, output_padding=2)),
        (2, 2, 4, 3),
    ),
    "conv_transpose3d": (lambda: conv_net(nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 2))), (2, 2, 3, 2, 3)),
}


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
@pytest.mark.parametrize(("build", "shape"), HAND_WRITTEN.values(), ids=HAND_WRITTEN)
def test_oracle_is_the_chain_rule_with_v(oracle, build, shape):
    model, x = build(), draw(*shape)
    feedback = random_feedback(model)
    want = chain_rule(model, feedback, x)
    got = oracle(model, feedback, x)
    torch.testing.assert_close(got.output, want.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(got, want)
    assert_unlike(got, by_backprop(model, x), ["input", "0.weight", "0.bias", "2.weight"])


@pytest.mark.parametrize(("build", "shape"), HAND_WRITTEN.values(), ids=HAND_WRITTEN)
def test_chain_rule_with_w_is_backprop(build, shape):
    model, x = build(), draw(*shape)
    feedback = {
        name: layer.weight.detach() for name, layer in model.named_children() if hasattr(layer, "weight")
    }
    assert_same_gradients(chain_rule(model, feedback, x), by_backprop(model, x))


# --- the oracles against each other ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROBLEMS)
@given(data=st.data())
def test_oracles_agree(kind, data):
    problem = data.draw(PROBLEMS[kind])
    model, x = problem.model(), problem.input()
    feedback = random_feedback(model)
    assert_matches_oracle(by_backward_hooks(model, feedback, x), model, feedback, x)


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
@pytest.mark.parametrize("kind", PROBLEMS)
@given(data=st.data())
def test_w_as_feedback_is_backprop(oracle, kind, data):
    problem = data.draw(PROBLEMS[kind])
    model, x = problem.model(), problem.input()
    w = {name: model.get_submodule(name).weight.detach() for name in ("upstream", "layer", "downstream")}
    assert_same_gradients(oracle(model, w, x), by_backprop(model, x))


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_only_layers_with_feedback_are_rerouted(oracle):
    model, x = mlp(), draw(3, 4)
    feedback = random_feedback(model, ["2"])
    got, exact = oracle(model, feedback, x), by_backprop(model, x)
    for name in ("2.weight", "2.bias", "4.weight", "4.bias"):
        assert torch.equal(got.parameters[name], exact.parameters[name])
    assert_unlike(got, exact, ["input", "0.weight", "0.bias"])


def test_oracles_agree_on_a_network_with_skip_connections():
    model, x = redrawn(Net()), draw(3, 2, 9, 9)
    feedback = random_feedback(model)
    assert_matches_oracle(
        by_saved_tensors(model, feedback, x),
        model,
        feedback,
        x,
        unlike=[name for name, _ in model.named_parameters() if not name.startswith("classifier")],
        oracles={"backward hooks": by_backward_hooks},
    )


def test_saved_tensor_swap_follows_views_of_the_weight():
    """A fused projection uses slices of one weight: each is swapped for the same slice of V."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 6, bias=False)

        def forward(self, x):
            q, k = self.qkv.weight.chunk(2)
            return nn.functional.linear(x, q).tanh() * nn.functional.linear(x, k)

    model, x = redrawn(Fused()), draw(3, 4)
    v = random_feedback(model)["qkv"]
    got = by_saved_tensors(model, {"qkv": v}, x)

    w_q, w_k = model.qkv.weight.detach().chunk(2)
    v_q, v_k = v.chunk(2)
    q, k = torch.tanh(x @ w_q.T), x @ w_k.T
    slopes = torch.linspace(-1, 2, q.numel(), dtype=q.dtype).reshape(q.shape)
    error = slopes + q * k
    want = (error * k * (1 - q**2)) @ v_q + (error * q) @ v_k
    torch.testing.assert_close(got.input, want, rtol=1e-12, atol=1e-12)


# --- what the oracles must not do ------------------------------------------------------------------------


def test_oracles_leave_the_model_alone():
    model, x = mlp(), draw(3, 4)
    before = gradients(model, x)
    for oracle in ORACLES.values():
        oracle(model, random_feedback(model), x)
    assert_same_gradients(gradients(model, x), before, tolerance=0.0)
    assert not any(layer._backward_hooks for layer in model.modules())


def test_mechanisms_end_with_their_context():
    model, x = mlp(), draw(3, 4)
    feedback, exact = random_feedback(model), by_backprop(model, x)
    for mechanism in (swapped_saved_tensors, literal_backward_hooks):
        with mechanism(model, feedback):
            assert_unlike(gradients(model, x), exact)
        assert_same_gradients(gradients(model, x), exact, tolerance=0.0)


def test_saved_tensor_oracle_refuses_a_weight_that_it_never_saw():
    class Derived(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight * 2)

    model = redrawn(Derived())
    seen = random_feedback(model)
    with pytest.raises(AssertionError, match="never saved"):
        by_saved_tensors(model, seen, draw(2, 4), lambda m, x: x @ (m.fc.weight.T * 2))


def test_comparison_notices_backprop_and_a_missing_gradient():
    model, x = mlp(), draw(3, 4)
    feedback = random_feedback(model)
    right = by_saved_tensors(model, feedback, x)
    assert_matches_oracle(right, model, feedback, x, call)

    with pytest.raises(AssertionError, match="every gradient is backprop's"):
        assert_matches_oracle(by_backprop(model, x), model, feedback, x)
    missing = Gradients(right.output, right.input, {**right.parameters, "2.weight": None})
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_matches_oracle(missing, model, feedback, x)
    not_a_number = Gradients(right.output, right.input * float("nan"), right.parameters)
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_matches_oracle(not_a_number, model, feedback, x)
    off = Gradients(right.output, right.input * (1 + 2 * TOLERANCE), right.parameters)
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_matches_oracle(off, model, feedback, x)
    in_float32 = {name: v.float().double() for name, v in feedback.items()}  # V loses half its digits once
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_matches_oracle(by_saved_tensors(model, in_float32, x), model, feedback, x)
    other_output = Gradients(right.output.nextafter(right.output + 1), right.input, right.parameters)
    with pytest.raises(AssertionError, match="the forward has changed"):
        assert_matches_oracle(other_output, model, feedback, x)
    with pytest.raises(AssertionError, match="the forward has changed"):  # whatever the tolerance is
        assert_matches_oracle(other_output, model, feedback, x, tolerance=1.0)
    assert_matches_oracle(other_output, model, feedback, x, bit_equal=False)
    other_output.output.mul_(1 + 100 * TOLERANCE)
    with pytest.raises(AssertionError, match="not close"):
        assert_matches_oracle(other_output, model, feedback, x, bit_equal=False)
