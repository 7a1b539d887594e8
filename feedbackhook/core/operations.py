"""The torch functions that are watched, and how each sends an error signal to its input through V.

Letters: delta the error signal at the output (in the output's shape), V the feedback weight in the layout of
the weight, x the input. Each function is linear in x and in its weight, apart from the bias, which gives it
three products: V x, V^T delta, and delta x^T, the gradient of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(delta, V, x or None) -> the error signal at the input, in the input's shape. If x is given, only its shape
and memory layout are read, never its values."""

Apply = Callable[[Tensor, Tensor], Tensor]
"""(x, V) -> V x without a bias, in the output's shape."""

Outer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, delta, V) -> delta x^T, the gradient of the weight, in the shape of V, whose values are not read."""


class Call(NamedTuple):
    """The parsed arguments of one call of a torch function.

    Args:
        input: the tensor that the weight is applied to.
        weight: the weight as the call uses it.
        product: computes the error signal's product with V.
        apply: computes the input's product with V.
        outer: computes the product of input and error signal.
        wants_input: whether that product is faster if the input is given.
        place: the input's position among the positional arguments.
        keyword: the input's name among the keyword arguments.
    """

    input: Tensor
    weight: Tensor
    product: Product
    apply: Apply
    outer: Outer
    wants_input: bool = False
    place: int = 0
    keyword: str = "input"

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
        """Call the function with `x` instead of the input."""
        if len(args) > self.place:
            return func(*args[: self.place], x, *args[self.place + 1 :], **kwargs)
        return func(*args, **{**kwargs, self.keyword: x})

    def samples(self) -> int:
        """Return how many samples the input has. In linear layers each position of a sample counts as one."""
        x, dims = self.input, self.weight.dim()
        if dims > 2:
            return x.shape[0] if x.dim() == dims else 1
        return math.prod(x.shape[:-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(input, weight, _linear_product, F.linear, _linear_outer)


def _linear_product(delta: Tensor, feedback: Tensor, x: Tensor | None) -> Tensor:
    # delta V over the last dimension, as one matrix product: `matmul` would compute one per sample if delta
    # cannot be viewed as a matrix.
    if feedback.dim() == 1:  # a row of a weight gives a single output, without a dimension
        return delta.unsqueeze(-1) * feedback
    if delta.is_nested:
        return F.linear(delta, feedback.t())
    rows = torch.mm(delta.reshape(-1, delta.shape[-1]), feedback)
    return rows.view(*delta.shape[:-1], feedback.shape[1])


def _linear_outer(x: Tensor, delta: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 1:
        return torch.mv(x.reshape(-1, x.shape[-1]).t(), delta.reshape(-1))
    return torch.mm(delta.reshape(-1, delta.shape[-1]).t(), x.reshape(-1, x.shape[-1]))


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **more: Any
) -> Call:
    """beta bias + alpha x W. The weight has a column for each output, as in Conv1D of transformers."""

    def product(delta: Tensor, feedback: Tensor, x: Tensor | None) -> Tensor:
        error = torch.mm(delta, feedback.t())
        return error if alpha == 1 else error * alpha

    def apply(x: Tensor, v: Tensor) -> Tensor:
        output = torch.mm(x, v)
        return output if alpha == 1 else output * alpha

    def outer(x: Tensor, delta: Tensor, like: Tensor) -> Tensor:
        gradient = torch.mm(x.t(), delta)
        return gradient if alpha == 1 else gradient * alpha

    return Call(mat1, mat2, product, apply, outer, place=1, keyword="mat1")


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Call:
    n = weight.dim() - 2
    dilation = _each(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = [0] * n if padding == "valid" else _each(padding, n)  # type: ignore[arg-type]
    geometry = _Geometry(_each(stride, n), before, dilation, False, [0] * n, groups)
    extra = [a - b for a, b in zip(after, before, strict=True)]
    return _convolution_call(input, weight, geometry, extra, wants_input=not any(extra))


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Call:
    n = weight.dim() - 2
    geometry = _Geometry(
        _each(stride, n), _each(padding, n), _each(dilation, n), True, _each(output_padding, n), groups
    )
    return _convolution_call(input, weight, geometry, [0] * n, wants_input=True)


def _convolution_call(
    input: Tensor, weight: Tensor, geometry: _Geometry, extra: list[int], wants_input: bool
) -> Call:
    return Call(
        input,
        weight,
        partial(_conv_product, input.shape, geometry, extra),
        partial(_conv_apply, geometry, extra),
        partial(_conv_outer, geometry, extra),
        wants_input,
    )


_convolution_backward = torch.ops.aten.convolution_backward.default


class _Geometry(NamedTuple):
    """The arguments of `aten.convolution_backward` from the stride on."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def _conv_product(
    shape: Sequence[int],
    geometry: _Geometry,
    extra: list[int],
    delta: Tensor,
    feedback: Tensor,
    x: Tensor | None,
) -> Tensor:
    """Return the convolution's input gradient with V as its kernel.

    `shape` is the input's. `extra` is how much more padding "same" adds at the end of each dimension than at
    its start, for even kernels. The product then belongs to the padded input and is cropped.
    """
    batched = len(shape) == feedback.dim()
    size = list(shape) if batched else [1, *shape]
    padded = size[:2] + [s + e for s, e in zip(size[2:], extra, strict=True)] if any(extra) else size
    delta = delta if batched else delta.unsqueeze(0)
    # The input gradient needs only the input's shape and layout. The input itself is best. An uninitialized
    # tensor comes next, since a single number that is expanded would be copied to full size.
    stand_in = delta.new_empty(padded) if x is None else x if batched else x.unsqueeze(0)
    mask = [True, False, False]
    error: Tensor = _convolution_backward(delta, stand_in, feedback, None, *geometry, mask)[0]
    if any(extra):
        for dim, wanted in enumerate(size):
            error = error.narrow(dim, 0, wanted)
    return error if batched else error.squeeze(0)


def _conv_apply(geometry: _Geometry, extra: list[int], x: Tensor, v: Tensor) -> Tensor:
    """Return the convolution of the input with V."""
    batched = x.dim() == v.dim()
    output = torch.convolution(_padded(x if batched else x.unsqueeze(0), extra), v, None, *geometry)
    return output if batched else output.squeeze(0)


def _conv_outer(geometry: _Geometry, extra: list[int], x: Tensor, delta: Tensor, like: Tensor) -> Tensor:
    """Return the convolution's weight gradient."""
    if x.dim() != like.dim():
        x, delta = x.unsqueeze(0), delta.unsqueeze(0)
    mask = [False, True, False]
    gradient: Tensor = _convolution_backward(delta, _padded(x, extra), like, None, *geometry, mask)[1]
    return gradient


def _padded(x: Tensor, extra: list[int]) -> Tensor:
    """Return the input with more zeros at the end of each dimension."""
    return F.pad(x, [size for e in reversed(extra) for size in (0, e)]) if any(extra) else x


def _each(value: int | Sequence[int], n: int) -> list[int]:
    """Return one number for each of n dimensions; a single number counts for all."""
    values = list(value) if isinstance(value, Sequence) else [int(value)]
    return values * n if len(values) == 1 else values


OPERATIONS: dict[Callable[..., Any], Callable[..., Call]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
    F.conv_transpose3d: _conv_transpose,
}
"""The torch functions that are rerouted, each with the function that parses its arguments."""

MATRIX_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    torch.tensordot,
    F.bilinear,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.baddbmm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}
"""Functions that may send an error signal through a weight without being rerouted. Every call of them is
checked; the audit finds what other functions do."""

COPYING: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float,
        Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.__getitem__, torch.index_select,
        Tensor.index_select, torch.reshape, Tensor.reshape, torch.flatten, Tensor.flatten, torch.flip,
        Tensor.flip, torch.roll, Tensor.roll, Tensor.repeat,
    }
)  # fmt: skip
"""Functions that select and order the entries of a tensor and may return a new one. What they do to W, they
do to V as well."""

WATCHED = dict.fromkeys((*OPERATIONS, *MATRIX_PRODUCTS, *COPYING, F.multi_head_attention_forward))
"""All functions whose calls are looked at."""
