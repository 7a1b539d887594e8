"""Every architecture module of timm: one small model of each, patched, against the oracles.

`python docs/coverage.py` makes the same comparisons and writes them into docs/coverage.md.
"""

from __future__ import annotations

import pytest
from support.coverage import direct
from support.coverage.comparison import Row
from support.coverage.timm_models import CASES, IDS, REFUSED, Case, fill, smallest

IN_SHORT = {
    "beit",
    "convnext",
    "deit",
    "densenet",
    "efficientnet",
    "eva",
    "levit",
    "maxxvit",
    "mlp_mixer",
    "mobilenetv3",
    "nfnet",
    "resnet",
    "swin_transformer",
    "swin_transformer_v2",
    "vision_transformer",
}
"""The modules that `make test` runs."""


@pytest.mark.filterwarnings("ignore:.*belong to no layer that can be patched:UserWarning")  # in the table
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.slow) for name in IDS]
)
def test_model(name):
    row = Row(name)
    fill(row)
    assert 0 < row.rerouted <= row.calls
    assert row.result.startswith("ok")


# Its blocks take the pixels of each patch first, whose batch is that of all patches.
REFUSED_AT_BLOCKS = {
    "tnt, blocks": "refused: the batches of the model's output and of the input of 'blocks.0' (and 11 more)"
}


@pytest.mark.filterwarnings("ignore:.*belong to no layer that can be patched:UserWarning")  # in the table
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.split(",")[0] in IN_SHORT else pytest.mark.slow)
        for name in direct.IDS
    ],
)
def test_model_with_direct_feedback(name):
    row = Row(name)
    direct.fill(row)
    if name in REFUSED_AT_BLOCKS:
        assert row.result.startswith(REFUSED_AT_BLOCKS[name])
        return
    assert row.result.startswith("ok")
    assert row.rerouted > 0


def test_a_module_without_a_row_gets_its_smallest_model():
    assert smallest("convit") == Case("convit_tiny", 32, {"img_size": 32})


def test_short_list_names_modules():
    assert IN_SHORT | set(REFUSED) <= set(CASES)
