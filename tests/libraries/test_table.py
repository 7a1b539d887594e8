"""`python docs/coverage.py`: a section for each library, and no table of all models lost to some of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.coverage.comparison import Row
from support.paths import ROOT


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/coverage.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_coverage", ROOT / "docs" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks there for its annotations
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    return module


def test_only_the_sections_that_were_compared_change(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(row: Row) -> None:
        row.input, row.layers, row.error = "2x3x8x8", 4, 3e-16
        assert row.case != "bad", "gradients differ | by much"

    library = command.Library("timm", "9.9", ["bad", "good"], fill)
    monkeypatch.setattr(command, "LIBRARIES", (library,))
    output = tmp_path / "coverage.md"
    assert command.main(output=str(output)) == 1
    text, before = output.read_text(), command.TABLE.read_text()
    head, hand_written, timm, *others = text.split("\n## ")
    sections = before.split("\n## ")
    assert [head, hand_written, *others] == [*sections[:2], *sections[3:]]
    assert len(others) == 2
    assert "2 models, 1 failures; " in timm
    assert "| good |  | 2x3x8x8 | 4 | 0 | 0 | 1e-15 |  | ok |" in timm
    assert "| FAILED: AssertionError: gradients differ / by much" in timm
    assert "timm good: ok" in capsys.readouterr().out


def test_some_models_do_not_replace_the_table_of_all(command: ModuleType) -> None:
    before = command.TABLE.read_text()
    with pytest.raises(SystemExit, match="give another --output"):
        command.main(models=["resnet"])
    with pytest.raises(SystemExit, match="unknown models resnot; known: alexnet, "):
        command.main(models=["resnot"], output="elsewhere.md")
    assert command.TABLE.read_text() == before
