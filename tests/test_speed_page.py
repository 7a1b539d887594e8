"""The page about speed says what the benchmarks' results are."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import speed  # noqa: E402


def test_the_page_is_that_of_the_results() -> None:
    assert (ROOT / "docs/speed.md").read_text() == speed.page()


def test_a_goal_is_missed_by_what_the_results_say() -> None:
    rows = [
        {"case": f"{start}_cpu", "contestant": "uSF", "ratio": 1.05, "from": 1.0, "to": 1.1, "total": 1.0}
        for start in speed.MODELS.values()
    ]
    figures = speed.Figures(speed.pd.DataFrame(rows))
    assert figures.missed([1.1, 1.05, 1.03], ["uSF"], "_cpu") == "uSF on ViT-tiny (2.0)"
    assert figures.missed([1.1, 1.1, 1.1], ["uSF"], "_cpu") == "none"
    assert figures.missed([1.1, 1.1, 1.1], ["brSF"], "_cpu").count("(not measured)") == 3
    assert figures.cell("elsewhere", "uSF") == "–"
    assert figures.spread(rows[0]["case"], "uSF") == 10
