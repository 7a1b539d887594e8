"""The store is read by reports and written by experiments, and knows neither."""

from __future__ import annotations

import ast

import pytest
from support.paths import ROOT

FILES = sorted((ROOT / "feedbackhook" / "store").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_store_imports_nothing_of_the_package_but_itself(file) -> None:
    names = [
        node.module
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("feedbackhook")
    ]
    assert all(name.startswith("feedbackhook.store") for name in names)
