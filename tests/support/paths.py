"""Where things are, as seen from the tests."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_path() -> str:
    """PYTHONPATH for a process that imports `support`."""
    return os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
