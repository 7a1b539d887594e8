"""The controls of a sweep: networks of which only the classifier learns, so that no feedback weight matters.

A condition that is not better than they are has not shown that error signals below the classifier are of use
(the frozen body as a baseline: Bartunov et al. 2018, Refinetti et al. 2021).
"""

from __future__ import annotations

from dataclasses import replace

from feedbackhook.experiments.conditions import Condition
from feedbackhook.experiments.config import FeedbackConfig, RunConfig

ALONE, DRAWN = "classifier alone", "body frozen as drawn"
BOTH = f"{ALONE}, {DRAWN}"
"""Without pretrained weights, the body keeps the weights as drawn, so that both are one."""

REFERENCE = "SGD"


def is_control(condition: str) -> bool:
    """Whether a condition of a sweep is one of its controls."""
    return condition in (ALONE, DRAWN, BOTH)


def controls(reference: RunConfig) -> dict[str, RunConfig]:
    """Return the controls by name.

    Args:
        reference: a run of the condition with which the others are compared.
    """
    if reference.condition is not None:
        reference = replace(Condition.parse(reference.condition).configure(reference), condition=None)
    alone = replace(
        reference,
        feedback=FeedbackConfig(mode=None),
        model=replace(reference.model, frozen="Top", trainable=None),
    )
    found = {ALONE if reference.model.weights else BOTH: alone}
    if reference.model.weights:
        found[DRAWN] = replace(alone, model=replace(alone.model, weights=None))
    return {name: replace(run, label=name) for name, run in found.items()}
