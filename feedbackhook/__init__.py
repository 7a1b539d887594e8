"""Send backprop's error signals through feedback weights of your choice, in any PyTorch network as it is."""

from feedbackhook.core.audit import Finding
from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.errors import ExactGradientError
from feedbackhook.diagnosis.diagnose import diagnose
from feedbackhook.diagnosis.diagnosed import Diagnosis
from feedbackhook.diagnosis.profile import profile
from feedbackhook.diagnosis.profiled import Profile
from feedbackhook.handle import LayerRow, Patch
from feedbackhook.measurement import Row, measure
from feedbackhook.optim import BatchManhattan
from feedbackhook.patching import get_patch, patch, unpatch
from feedbackhook.rng import CounterRNG
from feedbackhook.rules import register_rule
from feedbackhook.selection import classifier
from feedbackhook.store.recorder import Recorder, read

__all__ = [
    "BatchManhattan",
    "CounterRNG",
    "Diagnosis",
    "ExactGradientError",
    "Finding",
    "LayerInfo",
    "LayerRow",
    "Patch",
    "Profile",
    "Recorder",
    "Row",
    "classifier",
    "diagnose",
    "get_patch",
    "measure",
    "patch",
    "profile",
    "read",
    "register_rule",
    "unpatch",
]
