"""What can be wrong with stored files."""

from __future__ import annotations


class StoreError(ValueError):
    """A file is damaged, belongs to an earlier version, or is not what its folder should hold.

    The message names the file and what is wrong with it.
    """
