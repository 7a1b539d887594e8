"""Feedback rules: pure functions from a feedforward weight W and random parts to a feedback weight V.

Letters: W feedforward weight, V feedback weight, M magnitudes, S signs (+1 or -1), `o` the elementwise
product, sign(0) = 0. W and V have PyTorch's layout for the layer.

`registry.py` registers and looks up rules; each other file holds a family of rules. To add a rule, write a
frozen dataclass with the methods of `Rule` in a file here, decorate it with `register_rule`, and import it
below. Direct rules (`direct.py`) send the error at the network's output through a random matrix B instead.
"""

from feedbackhook.core.feedback import Rule, redrawn_by_updates
from feedbackhook.rules.options import Magnitude, Redraw
from feedbackhook.rules.registry import (
    FIXED,
    RULES,
    AnyRule,
    changed,
    check_layers,
    describe,
    exact_classifier,
    expected_angle,
    follow,
    is_direct,
    make_rule,
    modes_of,
    register_rule,
    restored,
    rule_name,
    rule_values,
)

# Messages list the rules in this order.
# isort: off
from feedbackhook.rules.symmetric import Symmetric
from feedbackhook.rules.sign import Sign
from feedbackhook.rules.random import Random
from feedbackhook.rules.tensor import Given
from feedbackhook.rules.liao2016 import (
    BatchwiseRandomSign,
    FixedRandomSign,
    NormalizedUniformSign,
    RandomFeedback,
    UniformSign,
)
from feedbackhook.rules.direct import DirectFeedback, DirectKolenPollack, DirectTargets, SignDirectFeedback
from feedbackhook.rules.initialization import FeedbackAlignment, Initialization, initial_distribution
from feedbackhook.rules.moskovitz2018 import InitialMagnitudeSign, StrictNormSign
from feedbackhook.rules.xiao2019 import SignSymmetry
from feedbackhook.rules.mixed import Angle, Noise
from feedbackhook.rules.reduced import Quantized, Sparse
from feedbackhook.rules.structured import LowRank, Toeplitz
from feedbackhook.rules.spectral import Spectrum
from feedbackhook.rules.learned import (
    KolenPollack,
    LowDimensionalFeedback,
    OrthogonalProductFeedback,
    ProductFeedback,
)
from feedbackhook.rules.alignment import (
    ActivationAlignment,
    InformationAlignment,
    SymmetricAlignment,
    WeightMirror,
)

# isort: on

__all__ = [
    "FIXED",
    "RULES",
    "ActivationAlignment",
    "Angle",
    "AnyRule",
    "BatchwiseRandomSign",
    "DirectFeedback",
    "DirectKolenPollack",
    "DirectTargets",
    "FeedbackAlignment",
    "FixedRandomSign",
    "Given",
    "InformationAlignment",
    "InitialMagnitudeSign",
    "Initialization",
    "KolenPollack",
    "LowDimensionalFeedback",
    "LowRank",
    "Magnitude",
    "Noise",
    "NormalizedUniformSign",
    "OrthogonalProductFeedback",
    "ProductFeedback",
    "Quantized",
    "Random",
    "RandomFeedback",
    "Redraw",
    "Rule",
    "Sign",
    "SignDirectFeedback",
    "SignSymmetry",
    "Sparse",
    "Spectrum",
    "StrictNormSign",
    "Symmetric",
    "SymmetricAlignment",
    "Toeplitz",
    "UniformSign",
    "WeightMirror",
    "changed",
    "check_layers",
    "describe",
    "exact_classifier",
    "expected_angle",
    "follow",
    "initial_distribution",
    "is_direct",
    "make_rule",
    "modes_of",
    "redrawn_by_updates",
    "register_rule",
    "restored",
    "rule_name",
    "rule_values",
]
