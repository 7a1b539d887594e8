"""Batch Manhattan: gradient descent on the signs of the mini-batch gradient (Liao, Leibo and Poggio 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from feedbackhook.core.torch_internals import (
    foreach_add_,
    foreach_mul_,
    foreach_sign,
    foreach_sign_,
    foreach_sub_,
)

__all__ = ["BatchManhattan"]

_SETTINGS = (0, 1, 2, 3)


class BatchManhattan(Optimizer):
    r"""Batch Manhattan, settings 0 to 3 (Liao, Leibo and Poggio 2016, "How Important Is Weight Symmetry
    in Backpropagation?", section on Batch Manhattan).

    Each step adds :math:`lr \cdot \tau(t)` to a weight w. With G the gradient of the mini-batch, m the
    momentum, d the weight decay and sign(0) = 0,

    ======= ==========================================================================================
    setting :math:`\tau(t)`
    ======= ==========================================================================================
    0       :math:`-G + m \tau(t-1) - d w`, plain SGD with momentum
    1       :math:`-\mathrm{sign}(G) + m \tau(t-1) - d w`, the default
    2       :math:`\mathrm{sign}(-\mathrm{sign}(G) + m \tau(t-1) - d w)`
    3       :math:`\mathrm{sign}(\kappa(t))`, :math:`\kappa(t) = -\mathrm{sign}(G) + m \kappa(t-1) - d w`
    ======= ==========================================================================================

    Momentum does not include the learning rate, so a change of the learning rate acts at once. Parameters
    without a gradient stay as they are. Since ``torch.sign`` maps NaN to 0, a NaN gradient moves nothing in
    settings 1 to 3: watch the loss.

    Args:
        params: parameters, or dicts of parameter groups; each group may set every option.
        lr: learning rate, positive. Settings 1 to 3 move a weight by about ``lr`` per step whatever the
            size of the gradient, so it is usually far smaller than for SGD.
        momentum: m, in [0, 1).
        weight_decay: d, 0 or more.
        setting: 0, 1, 2 or 3.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or (at the step) a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        setting: int = 1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "setting": setting}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, checking its options as the constructor does."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure``, if given, evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise ValueError(
                "BatchManhattan needs dense gradients, but one of these is sparse "
                "(an embedding with sparse=True?)"
            )
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # tau for settings 0 to 2, kappa for setting 3
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        setting = group["setting"]
        foreach_mul_(buffers, group["momentum"])
        foreach_sub_(buffers, grads if setting == 0 else list(foreach_sign(grads)))
        if group["weight_decay"]:
            foreach_add_(buffers, params, alpha=-group["weight_decay"])
        if setting == 2:
            foreach_sign_(buffers)
        tau = foreach_sign(buffers) if setting == 3 else buffers
        foreach_add_(params, tau, alpha=group["lr"])


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: 0 < value < math.inf, "a positive number"),
    "momentum": (lambda value: 0 <= value < 1, "a number from 0 up to, but not including, 1"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "a number, 0 or more"),
}


def _check(options: dict[str, Any]) -> None:
    for name, (inside, wanted) in _RANGES.items():
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"BatchManhattan: {name} must be {wanted}, not {value!r}")
        if not inside(value):
            raise ValueError(f"BatchManhattan: {name} must be {wanted}, not {value!r}")
    setting = options["setting"]
    if isinstance(setting, bool) or not isinstance(setting, int):
        raise TypeError(f"BatchManhattan: setting must be one of {_SETTINGS}, not {setting!r}")
    if setting not in _SETTINGS:
        raise ValueError(f"BatchManhattan: setting must be one of {_SETTINGS}, not {setting!r}")
