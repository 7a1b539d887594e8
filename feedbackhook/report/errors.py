"""What can be wrong with a report."""

from __future__ import annotations


class ReportError(ValueError):
    """The report cannot be made from these runs, or not be written; the message says what to change."""


class NothingToDraw(ValueError):
    """The table lacks the metric that a figure shows."""
