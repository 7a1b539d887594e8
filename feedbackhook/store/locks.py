"""The lock of a run folder: one process writes to it at a time, and others can ask which.

The lock is the operating system's (`flock`), so it ends with the process however that ends. It is not
filelock's: before version 4 that empties the file with each attempt to lock it, so the first process that
asks would erase the name of the one that holds the lock.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_UNNAMED = "a process that left no name"


class FolderLock:
    """The lock of a run folder, held from construction until :meth:`release`.

    Args:
        folder: the run folder; its `metrics` folder must exist.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        path = _path(folder)
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(
                f"{folder} is being written by another run ({path.read_text().strip() or _UNNAMED}): wait "
                "for it to end, or use another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{process_name(os.getpid())}\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # for processes on other machines

    def touch(self) -> None:
        """Set the time of the lock file, to show other processes that this one is at work."""
        os.utime(self._file.fileno())

    def release(self) -> None:
        """Release the lock, even if a forked process, such as a data loader's worker, has the file open."""
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def holder(folder: str | os.PathLike[str]) -> str | None:
    """Return the process that holds the lock of a run folder, as "process ID on MACHINE", or None.

    The lock decides, on whichever machine it is held: a killed process leaves its name in the file.
    """
    import fcntl

    try:
        with open(_path(folder), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or _UNNAMED
    except FileNotFoundError:
        return None
    return None


def process_name(process: int | None) -> str:
    """Return the name by which :func:`holder` calls a process of this machine."""
    return f"process {process} on {socket.gethostname()}"


def _path(folder: str | os.PathLike[str]) -> Path:
    return Path(folder) / "metrics" / ".lock"
