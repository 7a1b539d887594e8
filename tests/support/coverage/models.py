"""A model made ready for a comparison, and its input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

DROP_RATES = (
    *("drop_prob", "drop_rate", "drop_path_rate", "attn_drop_rate", "dropout_rate"),
    *("attn_drop", "attention_dropout", "dropout", "drop"),
)


def prepared(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Put `model` into train mode and `dtype`, without dropout and without parameters that start near zero.

    A head of zeros sends no error signal back, and a layer scale of 1e-6 almost none, so gradients behind
    them would show nothing. Parameters that are constant and small are therefore drawn at random.
    """
    model.to(dtype).train()
    for module in model.modules():
        if "Drop" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
            module.p = 0.0
        for name in DROP_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            constant = parameter.flatten()[0].item()
            if abs(constant) <= 0.1 and (parameter == constant).all():
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 10
                values = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                parameter.copy_(values / max(fan_in, 1) ** 0.5)
    return model


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of standard normal pixels, always the same for its shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Run the model and join all tensors that it returns; the step of most models."""
    leaves = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    assert leaves
    return torch.cat([leaf.flatten() for leaf in leaves if leaf.is_floating_point()])
