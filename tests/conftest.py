"""Settings shared by all tests: reproducible hypothesis, fixed seeds, nothing left from test to test."""

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from feedbackhook.rules import RULES

pytest.register_assert_rewrite("support")

torch.set_num_threads(1)  # everything here is tiny, and xdist's workers share the cores

settings.register_profile(
    "feedbackhook",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("feedbackhook")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """No test reads or writes the cache of decoded images of whoever runs it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    with pytest.MonkeyPatch.context() as patch:
        # matplotlib's list of fonts, which takes seconds to make, stays where it is
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or os.path.join(cache, "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_rule_left_behind():
    """A rule that a test or a recipe registers is known to no other test."""
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)


@pytest.fixture(autouse=True)
def _no_function_mode_left_behind():
    """A mode that outlives its forward would act on every later torch call of the process."""
    depth = torch._C._len_torch_function_stack()
    yield
    assert torch._C._len_torch_function_stack() == depth


@pytest.fixture
def _clean_mode_stack():
    """For a test that is known to leave a mode behind: the stack is put in order after it."""
    depth = torch._C._len_torch_function_stack()
    yield
    while torch._C._len_torch_function_stack() > depth:
        torch.overrides._pop_mode()
