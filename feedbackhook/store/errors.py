"""What can be wrong with stored files."""

from __future__ import annotations


class StoreError(ValueError):
    """A file is damaged, belongs to an earlier version, or is not what its folder should hold.

    The message names the file and what is wrong with it.
    """


def one_line(error: Exception) -> str:
    """Return the text of an error on one line, for use inside another message."""
    return " ".join(str(error).split())
