"""What several commands use to print."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def plain_console(quiet: bool = False) -> Console:
    """A console for lines with paths and names, which it neither wraps nor takes for markup."""
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=quiet)


def print_whole(table: Table, *lines: str) -> None:
    """Print a table and lines without cutting or wrapping paths."""
    console = plain_console()
    if not console.is_terminal:  # a file or a pipe has no width to which the table should be cut
        console.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    if table.row_count:
        console.print(table)
    for line in lines:
        console.print(line)


def plain_table(title: str | None = None, show_edge: bool = True) -> Table:
    """A table in the style that all commands share."""
    return Table(box=box.SIMPLE, pad_edge=False, show_edge=show_edge, title=title)


def duration(seconds: float) -> str:
    """Seconds in the largest unit that fits, such as "1.5 h"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
