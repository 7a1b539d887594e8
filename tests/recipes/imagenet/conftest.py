"""The ImageNet recipe as a module."""

import pytest
from support.imagenet import reset_accelerate
from support.recipes import load_recipe


@pytest.fixture
def recipe():
    yield load_recipe("imagenet/resnet18")
    reset_accelerate()
