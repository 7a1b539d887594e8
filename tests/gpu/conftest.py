"""All tests in this folder need a GPU, or `FEEDBACKHOOK_TEST_DEVICE=cpu` to try them on the CPU."""

import pytest
import torch
from support.gpu import DEVICE


@pytest.fixture(autouse=True, scope="session")
def _needs_a_gpu():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; FEEDBACKHOOK_TEST_DEVICE=cpu tries it on the CPU")


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
