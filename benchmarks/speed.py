"""Write docs/speed.md from the results of the benchmarks and speed.md.jinja.

python benchmarks/speed.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from common import RESULTS
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tables import memory, step_time

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/speed.md"
MODELS = {
    "the paper's MNIST network, batch 100": "liao2016-mnist_batch100",
    "ResNet-18, 64 px, batch 32": "resnet18_64px_batch32",
    "ViT-tiny, 64 px, batch 32": "vit_tiny_patch16_224_64px_batch32",
}
"""The measured models, and how the names of their cases begin."""


class Figures:
    """The figures of the page.

    Args:
        steps: the table of :func:`tables.step_time`.
    """

    def __init__(self, steps: pd.DataFrame) -> None:
        self._rows = {(row["case"], row["contestant"]): row for row in steps.to_dict("records")}

    def ratio(self, case: str, contestant: str, what: str = "ratio") -> float:
        """A column of the table; NaN if it was not measured."""
        row = self._rows.get((case, contestant))
        return math.nan if row is None else float(row[what])

    def cell(self, case: str, contestant: str) -> str:
        """The median ratio to a plain step and its quartiles, as text."""
        if (case, contestant) not in self._rows:
            return "–"
        median, low, high = (self.ratio(case, contestant, what) for what in ("ratio", "from", "to"))
        return f"{median:.2f} ({low:.2f} to {high:.2f})"

    def spread(self, case: str, contestant: str) -> int:
        """How far apart the quartiles are, in points."""
        return round(100 * (self.ratio(case, contestant, "to") - self.ratio(case, contestant, "from")))

    def total(self, case: str, contestant: str) -> str:
        """The ratio of the total times of all rounds, as text."""
        value = self.ratio(case, contestant, "total")
        return "–" if math.isnan(value) else f"{value:.3f}"

    def missed(self, goals: Iterable[float], contestants: Iterable[str], suffix: str) -> str:
        """Which of these contestants miss the goal for each of `MODELS`, in the cases whose names end like
        this, and by how many points; as text."""
        found = []
        for (title, start), goal in zip(MODELS.items(), goals, strict=True):
            for contestant in contestants:
                points = round(100 * (self.ratio(start + suffix, contestant) - goal), 1)
                if math.isnan(points) or points > 0:
                    by = "not measured" if math.isnan(points) else points
                    found.append(f"{contestant} on {title.split(',')[0]} ({by})")
        return ", ".join(found) or "none"


def page() -> str:
    """Return the page as Markdown."""
    figures = Figures(step_time())
    gpu = pd.read_csv(RESULTS / "gpu.csv")
    earlier = gpu[gpu["rule"].str.endswith(" before")]
    draws = pd.read_csv(RESULTS / "rng_time.csv").set_index(["version", "method", "fused"])["median_ms"]
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("speed.md.jinja").render(
        models=MODELS,
        f=figures,
        noise=[figures.spread(start + "_cpu", "plain again") for start in MODELS.values()],
        memory={(row["case"], row["contestant"]): row for row in memory().to_dict("records")},
        gpu=gpu,
        draw=lambda *which: f"{draws[which]:.1f}",
        before={
            (row.network, row.batch, row.rule.removesuffix(" before")): f"{row.ratio:.2f}"
            for row in earlier.itertuples()
        },
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
