"""`feedbackhook table`, `report` and `plot`: files made from finished runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat

from feedbackhook.cli.parsers import Command
from feedbackhook.cli.printing import plain_console


def _table_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("sweep", type=str, help="the sweep's folder")
    parser.add_argument(
        "-o",
        "--output",
        type=str | None,
        help="folder for table.md, table.csv and table.png; null: the sweep's",
    )


def _table(given: Namespace) -> int:
    from feedbackhook.report.aggregate import sweep_table
    from feedbackhook.report.tables import as_markdown, write

    table = sweep_table(given.sweep)
    print(as_markdown(table))
    for path in write(table, given.output or given.sweep):
        print(path)
    return 0


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("sweep", type=str, help="the sweep's folder")
    parser.add_argument(
        "-o", "--output", type=str | None, help="file to write; null: report.html in the sweep's folder"
    )
    parser.add_argument(
        "--watch",
        type=PositiveFloat | None,
        metavar="MINUTES",
        help="write the page every MINUTES until all runs have ended; an open browser loads it again",
    )


def _report(given: Namespace) -> int:
    from feedbackhook.report.html.page import write
    from feedbackhook.report.html.watch import watch

    path = given.output or Path(given.sweep) / "report.html"
    if given.watch is None:
        print(write(given.sweep, path))
    else:
        watch(given.sweep, path, given.watch, tell=partial(print, flush=True))
    return 0


def _plot_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="a run folder, or a folder that holds runs at any depth")
    parser.add_argument(
        "--figures",
        type=list[str] | None,
        help="names of figures, such as [error, error_and_angle]; null: all but error_and_angle, the last "
        "error of each run against its mean gradient angle",
    )
    parser.add_argument("--output", type=str | None, help="folder for the figures; null: RUN/figures")
    parser.add_argument(
        "--size", type=Literal["readme", "column", "slide"], default="readme", help="where they are shown"
    )
    parser.add_argument("--dark", type=bool, default=False, help="light on dark")
    parser.add_argument(
        "--formats", type=list[Literal["png", "svg", "pdf"]], default=["png", "svg"], help="file formats"
    )


def _plot(given: Namespace) -> int:
    from feedbackhook.experiments.config import ConfigError
    from feedbackhook.names import nearest
    from feedbackhook.report import error_and_angle, theme
    from feedbackhook.report.plots import FIGURES, draw_all
    from feedbackhook.report.runs import collect
    from feedbackhook.store.recorder import read

    of_table = list(FIGURES if given.figures is None else given.figures)
    over_runs = error_and_angle.NAME in of_table
    of_table = [name for name in of_table if name != error_and_angle.NAME]
    if unknown := [name for name in of_table if name not in FIGURES]:
        known = [*FIGURES, error_and_angle.NAME]
        near = nearest(unknown[0], known)
        raise ConfigError(f"there is no figure {unknown[0]!r}{near or ': there are ' + ', '.join(known)}")
    folder = Path(given.output or Path(given.run) / "figures")
    try:
        table = read(given.run) if of_table else None
        with theme.use(given.size, given.dark):
            written, missing = draw_all(table, folder, given.formats, figures=of_table)
            if over_runs:
                written += error_and_angle.write(collect(given.run), folder, given.formats)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    console = plain_console()
    for path in written:
        console.print(f"figure: {path}")
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}")
    return 0


TABLE = Command(
    name="table",
    help="make the table of a sweep, beside the paper's",
    description="Make the table of a sweep: condition by dataset, beside the paper's error rates.",
    arguments=_table_arguments,
    run=_table,
)
REPORT = Command(
    name="report",
    help="write a page about a sweep, as one HTML file",
    description=(
        "Write a page about a sweep: its table, curves, alignment and runs, in one HTML file that needs no "
        "network."
    ),
    arguments=_report_arguments,
    run=_report,
)
PLOT = Command(
    name="plot",
    help="draw the figures of a run",
    description="Draw every figure that the table of a run, or of all runs in a folder, has values for.",
    arguments=_plot_arguments,
    run=_plot,
)
