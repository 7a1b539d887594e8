"""What a diagnosis holds, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from feedbackhook.diagnosis.checks import KINDS, UNDEFINED, Check
from feedbackhook.listing import aligned
from feedbackhook.measurement import Row

PREFIX, THRESHOLD = "check_", "_threshold"
"""A recorded check has two rows: `check_KIND` and `check_KIND_threshold`."""


@dataclass(frozen=True)
class Diagnosis:
    """What `feedbackhook.diagnose` found. `print(diagnosis)` shows a table with a verdict for each value.

    Args:
        checks: those of each layer, then those of the whole model.
        moments: bias, standard deviations (`check_noise`, of draws alone `check_draw_noise`, of exact
            gradients `check_exact_noise`), each over the norm of the expected exact gradient, and the exact
            gradients' `check_exact_stability` and `check_exact_signal`.
        batches: number of batches.
    """

    checks: list[Check]
    moments: list[Row]
    batches: int

    @property
    def failed(self) -> list[Check]:
        """The checks on the wrong side of their thresholds."""
        return [check for check in self.checks if check.failed]

    def of(self, layer: str | None, kind: str) -> Check:
        """Return one check of one layer, or of the whole model.

        Raises:
            KeyError: there is no such check.
        """
        for check in self.checks:
            if (check.layer, check.kind) == (layer, kind):
                return check
        raise KeyError(f"no check {kind!r} of {layer!r}")

    def rows(self) -> Iterator[Row]:
        """Yield what a recorder keeps: value and threshold of each check, then the moments."""
        for check in self.checks:
            yield Row(check.layer, check.depth, f"{PREFIX}{check.kind}", check.value)
            yield Row(check.layer, check.depth, f"{PREFIX}{check.kind}{THRESHOLD}", check.threshold)
        yield from self.moments

    def __str__(self) -> str:
        """Return a table of layers and checks, with the notes on what failed or is undefined."""
        layers = list(dict.fromkeys(check.layer for check in self.checks))
        by_place = {(check.layer, check.kind): check for check in self.checks}
        rows = [["layer", *(kind.title for kind in KINDS.values())]]
        for layer in layers:
            cells = [_cell(by_place.get((layer, kind))) for kind in KINDS]
            rows.append(["(all modules)" if layer is None else layer or "(root)", *cells])
        notes = [
            f"{check.layer or '(all modules)'}, {KINDS[check.kind].title}: {check.verdict}"
            + (f" ({check.note})" if check.note else "")
            for check in self.checks
            if check.verdict == UNDEFINED or check.failed
        ]
        count = len(self.failed)
        ending = f"{count} of {len(self.checks)} checks failed" if count else "no check failed"
        batches = f"{self.batches} batch{'es' * (self.batches > 1)}"
        return "\n".join([*aligned(rows), "", *notes, f"{ending}, over {batches}."])


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    number = "-" if math.isnan(check.value) else f"{check.value:.3g}"
    unit = "°" if check.kind == "angle" and number != "-" else ""
    return f"{number}{unit} {check.verdict}" if check.verdict != UNDEFINED else UNDEFINED
