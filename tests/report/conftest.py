"""A sweep and its page, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pages import leave_sweep

from feedbackhook.report.html.page import page


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_sweep(tmp_path_factory.mktemp("html") / "sweep")


@pytest.fixture(scope="session")
def html(folder: Path) -> str:
    return page(folder)
