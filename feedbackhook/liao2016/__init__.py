"""Liao, Leibo and Poggio (AAAI 2016), "How Important Is Weight Symmetry in Backpropagation?": its datasets,
networks, conditions and published error rates.

Importing this package registers them; `feedbackhook.experiments` imports it.
"""

from feedbackhook.experiments.models.registry import set_fallback_network
from feedbackhook.liao2016 import conditions as conditions
from feedbackhook.liao2016 import datasets as datasets
from feedbackhook.liao2016 import networks as networks
from feedbackhook.liao2016 import published as published

set_fallback_network("liao2016/mnist")
