"""What users are told when an error signal would not go through V."""

from __future__ import annotations

import warnings

from feedbackhook.core.torch_internals import stacklevel_outside


class ExactGradientError(RuntimeError):
    """An error signal went, or would go, through a patched weight itself instead of through its V."""


def exact_use(name: str, operation: str) -> ExactGradientError:
    """Return the error for a call in the forward that uses a patched weight and cannot be rerouted."""
    return ExactGradientError(
        f"the weight of {name!r} is used in {operation} in a way that cannot be rerouted: its error signal "
        f"would go through W. Pass it as the weight of F.linear, or exclude={[name]} to feedbackhook.patch"
    )


def warn(message: str) -> None:
    """Warn at the line outside this library and torch that led here."""
    warnings.warn(message, stacklevel=stacklevel_outside("feedbackhook.", "torch."))
