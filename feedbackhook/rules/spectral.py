"""The rule that keeps W's singular vectors and chooses the singular values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from feedbackhook.core.learning import full_precision
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import check_choice, check_integer, check_number
from feedbackhook.rules.registry import register_rule
from feedbackhook.rules.tensors import blocks, constant, wide, with_norm_of


@register_rule("svd")
@dataclass(frozen=True)
class Spectrum:
    """V = scale A f(D) B^T, where W = A D B^T is the singular value decomposition of the current W.

    A weight counts as one matrix for each group of a convolution: its first dimension by all others. Singular
    values that are zero up to rounding stay zero.

    Args:
        power: each singular value s becomes s^power, -4 to 4. 1 is W; 0 makes all equal, so that V is the
            closest matrix with orthonormal rows or columns; -1 is the transposed pseudoinverse of W.
        rank: how many of the largest singular values are kept, the others becoming 0; None keeps all.
        scale: "norm" gives V the norm of the current W; None is 1.
    """

    power: float = 0.0
    rank: int | None = None
    scale: Literal["norm"] | None = "norm"

    def __post_init__(self) -> None:
        check_number("power", self.power, -4, 4)
        if self.rank is not None:
            check_integer("rank", self.rank, 1)
        if self.scale is not None:
            check_choice("scale", self.scale, Literal["norm"])

    def draw(self, weight: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Return which singular values are kept, shape (groups, min(m, n)), which nothing is drawn for."""
        groups, m, n = blocks(weight, rng.layer.groups).shape
        places = torch.arange(min(m, n), device=weight.device).expand(groups, -1)
        kept = places >= 0 if self.rank is None else places < self.rank
        return {"kept": kept, "power": constant(self.power, weight)}

    def feedback(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Decompose the current W, and compose V."""
        with full_precision(weight.device):
            w = blocks(wide(weight), parts["kept"].shape[0])
            finite = w.isfinite().all()  # the decomposition of anything else would raise
            decompose = _in_no_cuda_graph if torch.compiler.is_compiling() else _decompose
            a, s, b = decompose(torch.where(finite, w, 0))
            smallest = s.amax(-1, keepdim=True) * max(w.shape[1:]) * torch.finfo(w.dtype).eps
            values = torch.where((s > smallest) & parts["kept"], s.pow(parts["power"]), 0)
            v = torch.where(finite, (a * values.unsqueeze(-2)) @ b, torch.nan)
            v = v if self.scale is None else with_norm_of(w, v)
        return v.reshape(weight.shape).to(weight.dtype)


def _decompose(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, s, b = torch.linalg.svd(w, full_matrices=False)
    return a, s, b


def _decompose_contiguous(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same in the layout that is promised to the compiler."""
    a, s, b = _decompose(w)
    return a.contiguous(), s, b.contiguous()


# An operator of its own, so that the compiler leaves it out of CUDA graphs: PyTorch's copies to the CPU on a
# GPU, which a graph cannot record, and does not say so.
_in_no_cuda_graph = torch.library.custom_op(
    "feedbackhook::svd", _decompose_contiguous, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_in_no_cuda_graph.register_fake
def _(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *groups, m, n = w.shape
    least = min(m, n)
    return w.new_empty(*groups, m, least), w.new_empty(*groups, least), w.new_empty(*groups, least, n)


@_in_no_cuda_graph.register_vmap
def _(
    info: Any, dims: tuple[int | None, ...], w: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    (dim,) = dims
    batch = w.expand(info.batch_size, *w.shape) if dim is None else w.movedim(dim, 0)
    return _in_no_cuda_graph(batch), (0, 0, 0)
