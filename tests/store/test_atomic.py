"""A file holds the old content or the new, whatever interrupts the write."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedbackhook.store.atomic import atomic_write


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")

    def write(text: str, fail: bool) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert path.read_text() == "old"
            if fail:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write("ne", fail=True)
    assert path.read_text() == "old"
    write("new", fail=False)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert path.read_text() == "new"
