"""Recipes as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from support.paths import ROOT

RECIPES = ROOT / "recipes"


def load_recipe(name: str) -> ModuleType:
    """Import recipes/NAME.py as if it were run as a script: its folder is the first on `sys.path`.

    The recipe itself stays in `sys.modules`, where jsonargparse looks up the names in annotations. The
    modules that it imports from its folder do not, so that a recipe in another folder may use the same names.
    """
    path = RECIPES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = set(sys.modules)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        for other in set(sys.modules) - before:
            file = getattr(sys.modules[other], "__file__", None)
            if file is not None and Path(file).parent == path.parent:
                del sys.modules[other]
    return module
