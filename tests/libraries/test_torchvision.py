"""Every family of torchvision's classifiers, segmenters and detectors, patched, against the oracles.

`python docs/coverage.py` makes the same comparisons and writes them into docs/coverage.md.
"""

from __future__ import annotations

import pytest
from support import oracle
from support.coverage.comparison import Row
from support.coverage.models import image, prepared
from support.coverage.torchvision_models import CASES, IDS, TINY, family_of, fill, losses
from torchvision import models

IN_SHORT = {"resnet", "shufflenetv2", "squeezenet"}
"""The families that `make test` runs."""


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in IN_SHORT else pytest.mark.slow) for family in IDS]
)
def test_model(family):
    row = Row(family)
    fill(row)
    assert 0 < row.rerouted <= row.calls
    assert row.result.startswith("ok")


def test_every_family_has_a_case():
    tried = (models, models.segmentation, models.detection)
    families = {family_of(name) for module in tried for name in models.list_models(module=module)}
    assert families == set(CASES)
    assert all(family_of(case.model) == family for family, case in CASES.items())


def test_losses_see_every_parameter():
    """With these targets every head of a detector gets a gradient."""
    model = prepared(models.get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None, **TINY))
    grads = oracle.gradients(model, image(2, 3, 64, 64), losses, input_requires_grad=False).parameters
    assert not [name for name, grad in grads.items() if grad is None or not grad.any()]
