"""The options of the recipes for other trainers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
from support.recipes import RECIPES, load_recipe
from support.trainers import BRSF, NEEDS, SIGN, load_trainer

TRAINERS = RECIPES / "retrofit" / "trainers"


def options(main: Callable[..., None], file: Path, *given: str) -> dict[str, Any]:
    """What `main` would be called with."""

    @functools.wraps(main)
    def spy(**arguments: Any) -> dict[str, Any]:
        return arguments

    files = [str(file)]
    found = jsonargparse.auto_cli(spy, args=list(given), as_positional=False, default_config_files=files)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", NEEDS)
def test_the_yaml_beside_a_recipe_has_its_settings_and_options_override_them(name):
    recipe, file = load_trainer(name), TRAINERS / f"{name}.yaml"
    more = ["--script", "train.py"] if name == "timm_script" else []
    assert options(recipe.main, file, *more)["feedback"] == SIGN
    other = options(recipe.main, file, *more, "--feedback.mode", "brSF", "--smoke", "true")
    assert other["feedback"] == BRSF
    assert other["smoke"] is True


@pytest.mark.parametrize(("name", "package"), [(name, each[0]) for name, each in NEEDS.items() if each])
def test_a_missing_package_is_named_with_the_way_out(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}.*\.\[trainers\]"):
        load_recipe(f"retrofit/trainers/{name}")
