"""The command line: `feedbackhook COMMAND`."""

from feedbackhook.cli.entry import main

__all__ = ["main"]
