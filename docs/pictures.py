"""Draw an example of each plot into docs/figures, from two short runs and from the sweeps in analysis/runs.

    for seed in 0 1; do
        feedbackhook train --condition "frSF+BN+BM concordance=0.75" --protocol.epochs 6 --record.every 6 \\
            --record.gradient_angle_every 12 --protocol.seed $seed --output runs/watched/seed$seed
    done
    python docs/pictures.py runs/watched
"""

from __future__ import annotations

import sys
from pathlib import Path

from feedbackhook import read
from feedbackhook.report.aggregate import sweep_table
from feedbackhook.report.plots import draw_all, error_against_concordance
from feedbackhook.report.runs import collect
from feedbackhook.report.tables import draw

HERE = Path(__file__).parent
SWEEPS = HERE.parent / "analysis" / "runs"


def main(runs: str) -> None:
    folder = HERE / "figures"
    _, missing = draw_all(read(runs), folder, dpi=80)
    if missing:
        raise SystemExit(f"not drawn: {missing}")
    found = collect(SWEEPS / "concordance").runs
    rule = found["rule"].fillna("backprop")
    errors = found.assign(rule=rule, error=found["best_error"])[["rule", "concordance", "error"]]
    error_against_concordance(errors).savefig(folder / "error_against_concordance.png", dpi=80)
    draw(sweep_table(SWEEPS / "mnist")).savefig(folder / "table.png", dpi=80)
    print(*sorted(folder.glob("*.png")), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
