"""Liao, Leibo and Poggio (AAAI 2016), "How Important Is Weight Symmetry in Backpropagation?": its datasets,
networks, conditions and published error rates.

Importing this package registers them; `feedbackhook.experiments` imports it. The defaults of sweeps (65
epochs, milestones after 50 and 60, five learning rates, setting 1 of Batch Manhattan) are the paper's. The
paper does not state the weight decay; the default, 5e-4, was that of its software.
"""

from feedbackhook.experiments.models.registry import set_fallback_network
from feedbackhook.liao2016 import conditions as conditions
from feedbackhook.liao2016 import datasets as datasets
from feedbackhook.liao2016 import networks as networks
from feedbackhook.liao2016 import published as published

set_fallback_network("liao2016/mnist")
