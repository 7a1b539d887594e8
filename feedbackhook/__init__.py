"""Send backprop's error signals through feedback weights of your choice, in any PyTorch network as it is."""

from feedbackhook.alignment import Row, measure
from feedbackhook.audit import Finding
from feedbackhook.guard import ExactGradientError
from feedbackhook.optim import BatchManhattan
from feedbackhook.patching import LayerRow, Patch, get_patch, patch, unpatch
from feedbackhook.recorder import Recorder, read
from feedbackhook.rng import CounterRNG
from feedbackhook.rules import register_rule
from feedbackhook.targets import LayerInfo, classifier

__all__ = [
    "BatchManhattan",
    "CounterRNG",
    "ExactGradientError",
    "Finding",
    "LayerInfo",
    "LayerRow",
    "Patch",
    "Recorder",
    "Row",
    "classifier",
    "get_patch",
    "measure",
    "patch",
    "read",
    "register_rule",
    "unpatch",
]
