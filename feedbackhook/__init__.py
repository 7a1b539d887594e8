"""Send backprop's error signals through feedback weights of your choice, in any PyTorch network as it is."""

from importlib.metadata import PackageNotFoundError, version

from feedbackhook.core.audit import Finding
from feedbackhook.core.discovery import LayerInfo
from feedbackhook.core.errors import ExactGradientError
from feedbackhook.core.learning import Local
from feedbackhook.diagnosis.diagnose import diagnose
from feedbackhook.diagnosis.diagnosed import Diagnosis
from feedbackhook.diagnosis.profile import profile
from feedbackhook.diagnosis.profiled import Profile
from feedbackhook.handle import Patch
from feedbackhook.listing import LayerRow
from feedbackhook.measurement import Row, measure
from feedbackhook.optim import BatchManhattan
from feedbackhook.patching import get_patch, patch, unpatch
from feedbackhook.rng import CounterRNG
from feedbackhook.rules import register_rule
from feedbackhook.selection import classifier
from feedbackhook.store.recorder import Recorder, read

try:
    __version__ = version("feedbackhook")
    """The version of the installed package, which follows from the tag of its commit."""
except PackageNotFoundError:  # the sources, without having been installed
    __version__ = "0+unknown"

__all__ = [
    "BatchManhattan",
    "CounterRNG",
    "Diagnosis",
    "ExactGradientError",
    "Finding",
    "LayerInfo",
    "LayerRow",
    "Local",
    "Patch",
    "Profile",
    "Recorder",
    "Row",
    "__version__",
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
