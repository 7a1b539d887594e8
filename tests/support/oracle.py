"""What learning with feedback weights must give, by two mechanisms that share nothing with the library.

A model without any patch and `feedback = {layer name: V}` (V in the layout of that layer's weight W) go in,
the gradients of a fixed scalar of the model's output come out:

- `by_saved_tensors`: autograd saves W to compute the input's gradient later; the saved W is swapped for V.
- `by_backward_hooks`: `register_full_backward_hook` returns V's product with the arriving error signal,
  written out for each kind of layer.
- `by_backprop`: neither, as the reference that learning with feedback must differ from.

Letters: N batch, C_in and C_out channels (or features), k kernel taps, `*S` spatial sizes.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import bounds

Feedback = Mapping[str, Tensor]
Step = Callable[[nn.Module, Tensor], Tensor]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


# --- gradients -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """A forward's output, and the gradients of `probe(output)`; None where nothing arrived."""

    output: Tensor
    input: Tensor | None
    parameters: dict[str, Tensor | None]

    def named(self) -> dict[str, Tensor | None]:
        """All gradients; the input's is called `input`."""
        return {"input": self.input, **self.parameters}


def call(model: nn.Module, x: Tensor) -> Tensor:
    """The usual step: the model is called."""
    return model(x)


def probe(output: Tensor) -> Tensor:
    """A scalar with another slope at every entry of the output, so that error signals do not cancel."""
    slopes = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
    return (slopes.reshape(output.shape) * output + output.square() / 2).sum()


def gradients(
    model: nn.Module, x: Tensor, step: Step = call, *, input_requires_grad: bool = True
) -> Gradients:
    """Run one forward and one backward of `model` as it stands, patched or not, from empty `.grad`."""
    x = x.detach().clone().requires_grad_(input_requires_grad)
    model.zero_grad(set_to_none=True)
    output = step(model, x)
    probe(output).backward()
    return read_gradients(model, x, output)


def read_gradients(model: nn.Module, x: Tensor, output: Tensor) -> Gradients:
    """Copy what a backward has left in `.grad`."""
    parameters = {name: _copy_of(p.grad) for name, p in model.named_parameters()}
    return Gradients(output.detach().clone(), _copy_of(x.grad), parameters)


def _copy_of(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


def by_backprop(model: nn.Module, x: Tensor, step: Step = call, **options: bool) -> Gradients:
    """Plain backprop on a copy of `model`."""
    return gradients(copy.deepcopy(model), x, step, **options)


def by_saved_tensors(
    model: nn.Module, feedback: Feedback, x: Tensor, step: Step = call, **options: bool
) -> Gradients:
    """The first oracle, on a copy of `model`.

    Raises AssertionError if a weight was never found among the saved tensors although the input requires
    grad: the oracle would be blind there, and agree with plain backprop.
    """
    model = copy.deepcopy(model)
    with swapped_saved_tensors(model, feedback) as swaps:
        result = gradients(model, x, step, **options)
    if options.get("input_requires_grad", True):
        assert set(swaps) == set(feedback), f"never saved: {sorted(set(feedback) - set(swaps))}"
    return result


def by_backward_hooks(
    model: nn.Module, feedback: Feedback, x: Tensor, step: Step = call, **options: bool
) -> Gradients:
    """The second oracle, on a copy of `model`. No in-place activations: full backward hooks forbid them."""
    model = copy.deepcopy(model)
    with literal_backward_hooks(model, feedback):
        return gradients(model, x, step, **options)


ORACLES = {"saved tensors": by_saved_tensors, "backward hooks": by_backward_hooks}


# --- the first mechanism: the saved-tensor swap -----------------------------------------------------------


@contextmanager
def swapped_saved_tensors(model: nn.Module, feedback: Feedback) -> Iterator[Counter[str]]:
    """Let every forward inside save V where autograd would save W, or any view of W.

    Yields a count of swaps by layer. It trusts that a saved weight serves the input's gradient alone, which
    holds for linear layers and convolutions; it does not see weights derived from W first, nor casts.
    """
    parameters = dict(model.named_parameters())
    weights = {
        name: (parameters[name] if name in parameters else model.get_submodule(name).weight).detach()
        for name in feedback
    }
    owners = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
    stand_ins = {name: _in_the_layout_of(weight, feedback[name]) for name, weight in weights.items()}
    swaps: Counter[str] = Counter()

    def pack(saved: Tensor) -> Tensor:
        name = owners.get(saved.untyped_storage().data_ptr())
        if name is None:
            return saved
        swaps[name] += 1
        offset = saved.storage_offset() - weights[name].storage_offset()
        return stand_ins[name].as_strided(saved.size(), saved.stride(), offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield swaps


def _in_the_layout_of(weight: Tensor, v: Tensor) -> Tensor:
    """V in W's strides, so that a view of W translates into the same view of V."""
    assert v.shape == weight.shape
    assert v.dtype == weight.dtype
    return torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype).copy_(v.detach())


# --- the second mechanism: the literal full backward hook -------------------------------------------------


@contextmanager
def literal_backward_hooks(model: nn.Module, feedback: Feedback) -> Iterator[None]:
    """Let every module named in `feedback` return V's product as the gradient of its input."""

    def hook_with(v: Tensor) -> Callable[..., tuple[Tensor] | None]:
        def hook(layer: nn.Module, grad_input: tuple, grad_output: tuple) -> tuple[Tensor] | None:
            if grad_input[0] is None:
                return None
            return (input_gradient(layer, v, grad_output[0], grad_input[0].shape),)

        return hook

    handles = [
        model.get_submodule(name).register_full_backward_hook(hook_with(v.detach()))
        for name, v in feedback.items()
    ]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        for handle in handles:
            handle.remove()


def input_gradient(layer: nn.Module, v: Tensor, error: Tensor, shape: Iterable[int]) -> Tensor:
    """`dE/dX = V^T dE/dN` for the layer's own stride, padding, dilation and groups (Liao et al. 2016).

    Args:
        layer: its options are read, its weight is not.
        v: `[C_out, C_in / groups, *k]`, or `[C_in, C_out / groups, *k]` for transposed convolutions.
        error: the error signal `dE/dN` at the layer's output.
        shape: the shape of the layer's input.
    """
    if isinstance(layer, nn.Linear):
        return error @ v
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return _conv_transpose_input_gradient(layer, v, error, tuple(shape))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _conv_input_gradient(layer, v, error, tuple(shape))
    raise TypeError(f"no literal product is written out for {type(layer).__name__}")


def _conv_input_gradient(layer: nn.Module, v: Tensor, error: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The transposed convolution with V back to the padded input, then the adjoint of the padding."""
    n = len(layer.kernel_size)
    pads = _paddings(layer)
    conv_transpose = CONV_TRANSPOSE[n]
    reached = conv_transpose(error, v, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    padded_size = [size + left + right for size, (left, right) in zip(shape[-n:], pads, strict=True)]
    unread = [size - reach for size, reach in zip(padded_size, reached.shape[-n:], strict=True)]
    of_padded = F.pad(reached, _flat((0, extra) for extra in unread))

    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    with torch.enable_grad():
        x = torch.zeros(shape, dtype=error.dtype, requires_grad=True)
        padded = F.pad(x, _flat(pads), mode=mode)
    return torch.autograd.grad(padded, x, of_padded)[0]


def _conv_transpose_input_gradient(
    layer: nn.Module, v: Tensor, error: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """A convolution with V; a long output padding makes it yield more entries than the input has."""
    n = len(layer.kernel_size)
    conv = CONV[n]
    grad = conv(
        error, v, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
    )
    for dim, size in enumerate(shape[-n:], start=grad.dim() - n):
        grad = grad.narrow(dim, 0, size)
    return grad


def _paddings(layer: nn.Module) -> list[tuple[int, int]]:
    """(left, right) for each spatial dimension; `same` puts the odd one on the right."""
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def _flat(pads: Iterable[tuple[int, int]]) -> list[int]:
    """In the order of `F.pad`: the last dimension comes first."""
    return [amount for pair in reversed(list(pads)) for amount in pair]


# --- comparisons -----------------------------------------------------------------------------------------

FLOOR = 2.0**-13  # of the largest gradient: smaller ones are measured against this share of it
TOLERANCE = 2**10 * bounds.ROUNDING["float64"] / FLOOR
"""Relative, in float64: 2**-30. A million roundings at random add up to a thousand, each of the largest
gradient at most. A V that was float32 for a moment is 20 times as far off."""

UNLIKE = 1e-3  # relative: a million times what rounding leaves, and what another V changes is of order 1


def distances(got: Gradients, want: Gradients) -> dict[str, float]:
    """Relative distance of each gradient; infinite where only one of the two exists.

    A gradient that is tiny beside the largest (below `FLOOR` of it: rounding noise where theory has zero) is
    measured against that share of the largest.
    """
    a, b = got.named(), want.named()
    assert a.keys() == b.keys()
    largest = max((g.norm().item() for g in b.values() if g is not None and g.numel()), default=0.0)
    return {name: _distance(a[name], b[name], floor=FLOOR * largest) for name in b}


def _distance(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    difference = (a - b).norm().item()
    if difference == 0:
        return 0.0
    scale = max(b.norm().item(), floor)
    return difference / scale if scale else float("inf")


def assert_same_gradients(
    got: Gradients, want: Gradients, tolerance: float = TOLERANCE, what: str = ""
) -> None:
    """Every gradient agrees; NaN agrees with nothing."""
    wrong = {name: d for name, d in distances(got, want).items() if not d <= tolerance}
    assert not wrong, f"gradients differ {what}: {wrong}"


def assert_bit_equal(got: Gradients, want: Gradients) -> None:
    """Output and every gradient agree in every bit."""
    assert torch.equal(got.output, want.output)
    assert_same_gradients(got, want, tolerance=0.0)


def assert_unlike(got: Gradients, exact: Gradients, names: Iterable[str] | None = None) -> None:
    """The named gradients (one at least, if none are named) are far from backprop's."""
    apart = {name for name, d in distances(got, exact).items() if d > UNLIKE}
    assert apart, "every gradient is backprop's"
    assert set(names or ()) <= apart, f"backprop's gradients: {sorted(set(names or ()) - apart)}"


def assert_matches_oracle(
    got: Gradients,
    model: nn.Module,
    feedback: Feedback,
    x: Tensor,
    step: Step = call,
    *,
    unlike: Iterable[str] | None = None,
    oracles: Mapping[str, Callable[..., Gradients]] | None = None,
    tolerance: float = TOLERANCE,
    bit_equal: bool = True,
    **options: bool,
) -> None:
    """`got` has `model`'s forward, each oracle's gradients, and not backprop's.

    Args:
        got: what the patched model gave.
        model: the same model without a patch.
        feedback: V by layer name.
        x: the batch.
        step: how the oracle runs `model`; it may be plainer than the step that gave `got`.
        unlike: the gradients that must be unlike backprop's; one of them at least, if not given.
        oracles: the saved-tensor swap alone, if not given.
        tolerance: relative, for gradients.
        bit_equal: whether the output has the forward's bits; if not, it too agrees to `tolerance` alone.
    """
    exact = by_backprop(model, x, step, **options)
    if bit_equal:
        assert torch.equal(got.output, exact.output), "the forward has changed"
    else:
        torch.testing.assert_close(got.output, exact.output, rtol=tolerance, atol=tolerance)
    assert_unlike(got, exact, unlike)
    for name, oracle in (oracles or {"saved tensors": by_saved_tensors}).items():
        want = oracle(model, feedback, x, step, **options)
        assert_same_gradients(got, want, tolerance, what=f"from the oracle of {name}")


def assert_matches_oracle_or_names_a_layer(run: Callable[[], Gradients], plain, feedback, x) -> None:
    """`run()` gives the oracle's gradients or raises a RuntimeError with the name of a patched layer."""
    try:
        got = run()
    except RuntimeError as error:
        if not any(repr(name) in str(error) for name in feedback):
            raise
        return
    assert_matches_oracle(got, plain, feedback, x)
