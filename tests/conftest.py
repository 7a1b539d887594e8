"""Settings shared by all tests: hypothesis profiles, fixed seeds, nothing left over from test to test.

`--hypothesis-profile=nightly`, or `FEEDBACKHOOK_HYPOTHESIS=nightly`, draws fresh examples in each run and
keeps those that fail in `.hypothesis`. The default profile always draws the same examples.
"""

import os
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from feedbackhook.rules import RULES

pytest.register_assert_rewrite("support")

torch.set_num_threads(1)  # every test is tiny, and the workers of xdist share the cores

settings.register_profile(
    "feedbackhook",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "nightly",
    settings.get_profile("feedbackhook"),
    derandomize=False,
    database=DirectoryBasedExampleDatabase(Path(__file__).parents[1] / ".hypothesis" / "examples"),
    max_examples=100,
    print_blob=True,
)
settings.load_profile(os.environ.get("FEEDBACKHOOK_HYPOTHESIS", "feedbackhook"))


@pytest.fixture(autouse=True, scope="session")
def _separate_cache(tmp_path_factory):
    """No test reads or writes the user's cache of decoded images."""
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
    """A rule that a test or a recipe registers is unknown to all other tests."""
    known = dict(RULES)
    yield
    RULES.clear()
    RULES.update(known)


@pytest.fixture(autouse=True)
def _no_function_mode_left_behind():
    """A mode that outlived its forward would act on every later torch call of the process."""
    depth = torch._C._len_torch_function_stack()
    yield
    assert torch._C._len_torch_function_stack() == depth


@pytest.fixture
def _clean_mode_stack():
    """For a test that is known to leave a mode behind: restore the stack after it."""
    depth = torch._C._len_torch_function_stack()
    yield
    while torch._C._len_torch_function_stack() > depth:
        torch.overrides._pop_mode()
