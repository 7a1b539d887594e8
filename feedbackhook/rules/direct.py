"""Direct rules: the error at the network's output goes straight to each site through a fixed random matrix B.

Letters: K numbers of the output's error signal e in one row (a sample, or a position of one), D features of a
site in one row, y the one-hot target. B has the shape (D, K); what a site receives is B e, B sign(e) or B y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackhook.core.learning import LearnsFrom
from feedbackhook.rng import CounterRNG
from feedbackhook.rules.options import check_number
from feedbackhook.rules.registry import register_rule

DirectScale = Literal["fan_out", "kaiming"]


@register_rule("DFA")
@dataclass(frozen=True)
class DirectFeedback:
    """B e, with B drawn once: direct feedback alignment (Nokland 2016).

    Args:
        sites: the modules whose inputs are the sites: a regular expression for the full name, or a list of
            full names and name suffixes. Of modules inside each other, the outermost count. None: the input
            of each patched layer.
        output: full name of the module whose output's gradient is e. None: the model itself.
        shared: whether all sites take the first rows of one matrix, as wide as the widest site (Launay et al.
            2020), instead of each its own.
        scale: B ~ U[-s, s] with this s: "fan_out" is 1/sqrt(D) (Nokland's code; Launay's normalization, where
            D is that of the widest site), "kaiming" is sqrt(6 / D) (the code of Frenkel et al.), None is 1,
            and a number is used as it is.
    """

    sites: str | Sequence[str] | None = None
    output: str | None = None
    shared: bool = False
    scale: DirectScale | float | None = "fan_out"

    def __post_init__(self) -> None:
        if self.sites is not None and not isinstance(self.sites, str):
            if not isinstance(self.sites, Sequence) or not all(isinstance(each, str) for each in self.sites):
                raise TypeError(f"sites must be a regular expression or a list of names, not {self.sites!r}")
            if not self.sites:
                raise ValueError("sites is empty; None puts them at the inputs of the patched layers")
        if self.output is not None and not isinstance(self.output, str):
            raise TypeError(f"output must be the full name of a module, not {self.output!r}")
        if not isinstance(self.shared, bool):
            raise TypeError(f"shared must be True or False, not {self.shared!r}")
        if isinstance(self.scale, str):
            if self.scale not in get_args(DirectScale):
                raise ValueError(f"scale must be 'fan_out', 'kaiming', None or a number, not {self.scale!r}")
        elif self.scale is not None:
            check_number("scale", self.scale, 0)

    def draw(self, matrix: Tensor, rng: CounterRNG) -> dict[str, Tensor]:
        """Draw B in the shape (D, K), the dtype and on the device of `matrix`."""
        features = max(1, len(matrix))
        bounds = {"fan_out": 1 / math.sqrt(features), "kaiming": math.sqrt(6 / features), None: 1.0}
        bound = bounds[self.scale] if self.scale in bounds else float(self.scale)  # type: ignore[arg-type]
        return {"B": rng.uniform(matrix).mul_(2).sub_(1).to(matrix.dtype).mul_(bound)}

    def signal(self, error: Tensor, targets: Tensor | None) -> Tensor:
        """Return what B multiplies: e itself.

        Args:
            error: e, in the shape of the output.
            targets: the classes given to `Patch.targets`, or None.
        """
        return error


@register_rule("sDFA")
@dataclass(frozen=True)
class SignDirectFeedback(DirectFeedback):
    """B sign(e), with sign(0) = 0: DFA by the signs of the error alone (sDFA in Frenkel et al. 2021)."""

    def signal(self, error: Tensor, targets: Tensor | None) -> Tensor:
        """Return sign(e)."""
        return torch.sign(error)


@register_rule("DRTP")
@dataclass(frozen=True)
class DirectTargets(DirectFeedback):
    """B y as the gradient that a site receives, so that descent subtracts it: direct random target projection
    (Frenkel, Lefebvre and Bol 2021; sign and scale as in their code).

    The targets y are those of `Patch.targets`, or else the only negative entry of each row of e, which is the
    target where the loss is a softmax cross-entropy with hard labels (each row then adds up to 0). B y does
    not depend on the scale of the loss: an average over the batch, or a loss scale, changes the gradient of
    the last layer alone.
    """

    scale: DirectScale | float | None = "kaiming"

    def signal(self, error: Tensor, targets: Tensor | None) -> Tensor:
        """Return y, one row for each sample or position; a row whose target is negative (ignored) is zero.

        Raises:
            ValueError: e is in float16, which needs a loss scale that y does not carry; or no targets are
                given, and they do not follow from e.
        """
        if error.dtype == torch.float16:
            raise ValueError(
                "DRTP has no place for the loss scale that float16 needs, since B y does not depend on the "
                "loss; use bfloat16 or float32"
            )
        if targets is None:
            return _targets_in(error).to(error.dtype)
        classes = targets.to(error.device)
        return F.one_hot(classes.clamp(min=0), error.shape[-1]).to(error.dtype) * (classes >= 0).unsqueeze(-1)


@register_rule("DKP")
@dataclass(frozen=True)
class DirectKolenPollack(DirectFeedback):
    """B e, with B learned: dB = x e^T, x the input of the site (direct Kolen-Pollack, Webster, Choi and Ahn
    2021). For the last layer's input this is the gradient of its weight, as in Kolen-Pollack. With the same
    optimizer and weight decay, B comes to follow the weights between the site and the output.
    """

    scale: DirectScale | float | None = "kaiming"

    learns_from: ClassVar[LearnsFrom] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared:
            raise ValueError("DKP learns a matrix for each site, so they cannot share one")

    def direct_gradient(self, site: Tensor, signal: Tensor) -> Tensor:
        """Return x e^T, summed over samples."""
        return site.mT @ signal


def _targets_in(error: Tensor) -> Tensor:
    """Return where the targets are, from e = s (p - y) of softmax cross-entropy with hard labels, s > 0."""
    negative = error < 0
    wide = error.double() if error.device.type != "mps" else error.float()
    off = wide.sum(-1).abs() > 64 * torch.finfo(error.dtype).eps * wide.abs().sum(-1)
    if error.dim() < 2 or not bool(((negative.sum(-1) == 1) & ~off).all()):
        raise ValueError(
            "DRTP needs the targets: they follow from the output's error signal only under softmax "
            "cross-entropy with hard labels, where each row of it has exactly one negative entry and adds up "
            "to 0. Call patch.targets(y) before the forward, with the classes of its samples"
        )
    return negative
