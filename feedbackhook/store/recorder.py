"""The tidy table of a run: one row a measured value, in Parquet part files that outlive a killed process."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from torch import Tensor

__all__ = ["COLUMNS", "Recorder", "holder", "parts_of", "process_name", "read", "schema", "written_aside"]

COLUMNS = ("run", "step", "epoch", "layer", "depth", "metric", "value")
_NAMELESS = "a process that did not leave its name"


class Recorder:
    """Writes the table of one run: ``run, step, epoch, layer, depth, metric, value``.

    Rows wait in memory until the interval is over, or :meth:`flush` (or the end of the ``with`` block) writes
    them, as one more ``metrics/part-00000.parquet`` of the run folder. A part is written aside, then renamed,
    so a killed process leaves whole parts alone and loses the last interval's rows at most. One recorder a
    folder: the lock is the operating system's, so it ends with the process however that ends. Of the
    processes of a distributed run that of rank 0 writes; in the others every call does nothing.

    Args:
        folder: the run folder; made if it is missing.
        run: the run's name, by default the folder's.
        interval: seconds after which the next row takes those that wait to disk.
        tensorboard: also write each row as a scalar, and histograms of V, W and gradients at each step that
            :meth:`feedbackhook.Patch.watch` watches, to ``tensorboard/`` in the run folder.

    Attributes:
        epoch: the epoch that runs, for the rows of :meth:`feedbackhook.Patch.watch`; set it in the loop.
        histograms: whether histograms are wanted; so on every rank, since what is sharded is gathered for
            them.

    Raises:
        BlockingIOError: another recorder is at work in this folder.
        ImportError: pyarrow, or for ``tensorboard`` that, is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        run: str | None = None,
        interval: float = 30.0,
        tensorboard: bool = False,
    ) -> None:
        _pyarrow()
        folder = Path(folder).resolve()
        self.run = folder.name if run is None else run
        self.epoch = 0
        self._interval = interval
        self._parts = folder / "metrics"
        self._rows: list[tuple[str, int, int, str | None, int | None, str, float]] = []
        self._written = self._touched = time.monotonic()
        self._closed = False
        self._lock: IO[str] | None = None
        self._board: Any = None
        self.histograms = tensorboard
        if _rank():
            return
        board = _summary_writer() if tensorboard else None
        self._parts.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._parts / ".lock")
        for unfinished in self._parts.glob(".part-*"):
            unfinished.unlink()
        if board is not None:
            self._board = board(str(folder / "tensorboard"))

    def add(
        self,
        step: int,
        epoch: int,
        metric: str,
        value: float,
        layer: str | None = None,
        depth: int | None = None,
    ) -> None:
        """Add one row: ``metric`` has ``value`` after ``step`` updates, in ``epoch`` (0: before training).

        ``layer`` and ``depth`` (0: nearest to the input) belong to metrics that are measured layer by layer.
        """
        if self._closed:
            raise ValueError("this recorder is closed")
        if self._lock is None:
            return
        self._rows.append((self.run, int(step), int(epoch), layer, depth, metric, float(value)))
        if self._board is not None:
            self._board.add_scalar(metric if layer is None else f"{metric}/{layer}", float(value), int(step))
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write the rows that wait, if the interval is over."""
        if self._rows and time.monotonic() - self._written >= self._interval:
            self.flush()

    def touch_if_due(self) -> None:
        """Show others that this process is at work in the folder, once an interval: touch its lock file."""
        if self._lock is not None and time.monotonic() - self._touched >= self._interval:
            os.utime(self._lock.fileno())
            self._touched = time.monotonic()

    def add_histogram(self, step: int, name: str, values: Tensor) -> None:
        """Add a histogram to TensorBoard; without it, nothing happens. A tensor that holds what is not
        finite has none. A sharded one must have been gathered."""
        if self._board is not None and bool(values.isfinite().all()):
            self._board.add_histogram(name, values.float(), int(step))

    def flush(self) -> None:
        """Write the rows added since the last flush to disk, as one part file."""
        if self._rows:
            columns = [list(column) for column in zip(*self._rows, strict=True)]
            table = _pyarrow().table(columns, schema=schema())
            _write_part(table, self._parts / _part_name(len(parts_of(self._parts))))
            self._rows.clear()
        if self._board is not None:
            self._board.flush()
        self._written = time.monotonic()

    def drop_after(self, step: int, epoch: int | None = None) -> None:
        """Forget all rows of later steps than ``step``, and of later epochs than ``epoch``: a run that goes
        on from a checkpoint makes them anew.

        Parts are replaced one by one from the last backwards, so that being killed halfway does no harm.
        What TensorBoard was given stays.
        """
        if self._lock is None:
            return
        newest = math.inf if epoch is None else epoch
        self._rows = [row for row in self._rows if row[1] <= step and row[2] <= newest]
        field = _pyarrow().compute.field
        last = True
        for part in reversed(parts_of(self._parts)):
            table = _read_part(part)
            kept = table.filter((field("step") <= step) & (field("epoch") <= newest))
            last = last and not kept.num_rows
            if last:
                part.unlink()
            elif kept.num_rows < table.num_rows:
                _write_part(kept, part)

    def close(self) -> None:
        """Flush, and let go of the folder; closing twice is fine."""
        self._closed = True
        if self._lock is not None:
            try:
                self.flush()
            finally:
                _unlock(self._lock)
                self._lock = None
                if self._board is not None:
                    self._board.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(folder: str | os.PathLike[str]) -> pandas.DataFrame:
    """The table of a run folder, or of all the runs in a folder, as pandas has it.

    ``layer`` is missing and ``depth`` (Int64) is ``<NA>`` in rows that concern the whole network.

    Raises:
        FileNotFoundError: there is no table in this folder.
        ValueError: a part file is damaged or missing, or two runs have the same name; it names the files.
        ImportError: pandas or pyarrow is not installed.
    """
    pa = _pyarrow()
    _require("pandas")
    folders = [folder_ for folder_ in sorted(Path(folder).rglob("metrics")) if parts_of(folder_)]
    if not folders:
        raise FileNotFoundError(
            f"no table in {Path(folder).resolve()}: neither a run folder (metrics/part-00000.parquet) "
            "nor a folder of such"
        )
    tables = []
    owner: dict[str, Path] = {}
    for metrics in folders:
        table = pa.concat_tables([_read_part(part) for part in parts_of(metrics)])
        tables.append(table)
        for run in table.column("run").unique().to_pylist():
            if run in owner:
                folders_of_run = f"{owner[run].parent} and {metrics.parent}"
                raise ValueError(f"two runs are named {run!r}: {folders_of_run}; read one of them")
            owner[run] = metrics
    return pa.concat_tables(tables).to_pandas().astype({"depth": "Int64"})


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what is written there is renamed to ``path`` once it is on disk.

    So ``path`` holds the old content or the new, never a part of it, whenever the process or the machine
    stops. If the block raises, ``path`` stays as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _rank() -> int:
    """This process's rank among those of a distributed run; 0 where there is none."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))  # torchrun has set it, and the group is made later


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=True needs TensorBoard: pip install 'feedbackhook[tensorboard]'"
        ) from error
    return SummaryWriter


def holder(folder: str | os.PathLike[str]) -> str | None:
    """Return the process whose recorder holds a run folder, as "process ID on MACHINE", or None.

    The lock is what counts, on whichever machine it is held: a killed process leaves its name in the file.
    """
    import fcntl

    try:
        with open(Path(folder) / "metrics" / ".lock", "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or _NAMELESS
    except FileNotFoundError:
        return None
    return None


def process_name(process: int | None) -> str:
    """How :func:`holder` names a process of this machine, given its ID."""
    return f"process {process} on {socket.gethostname()}"


def _lock(path: Path) -> IO[str]:
    import fcntl

    file = open(path, "a")  # noqa: SIM115 - held open as long as the recorder lives
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        other = path.read_text().strip() or _NAMELESS
        raise BlockingIOError(
            f"{path.parent.parent} is being written by another run ({other}): wait for it, or use another "
            "folder"
        ) from None
    file.truncate(0)
    file.write(f"{process_name(os.getpid())}\n")
    file.flush()
    os.fsync(file.fileno())  # other machines are to see it
    return file


def _unlock(file: IO[str]) -> None:
    """Lets go of the lock, also where a process that was forked off (a data loader's) holds the file open."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def parts_of(folder: Path) -> list[Path]:
    """The part files of a ``metrics`` folder in order.

    Raises:
        ValueError: a part is missing, so the table is not whole.
    """
    try:
        names = sorted(filter(re.compile(r"part-.*\.parquet").fullmatch, os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    parts = [folder / name for name in names]
    for number, name in enumerate(names):
        if name != _part_name(number):
            raise ValueError(
                f"{folder / _part_name(number)} is missing, and later parts of its table are there"
            )
    return parts


def _write_part(table: pyarrow.Table, path: Path) -> None:
    import pyarrow.parquet

    with written_aside(path) as aside:
        pyarrow.parquet.write_table(table, aside, write_page_checksum=True)


def _read_part(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not table.schema.equals(schema()):
        raise ValueError(f"{path} is no part of a metrics table: it has the columns {table.column_names}")
    return table


def schema() -> pyarrow.Schema:
    """The columns of the table and their types."""
    pa = _pyarrow()
    text, number = pa.string(), pa.int64()
    types = (text, number, number, text, number, text, pa.float64())
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def _pyarrow() -> Any:
    _require("pyarrow.compute")
    import pyarrow

    return pyarrow


def _require(module: str) -> None:
    from importlib import import_module

    try:
        import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"the tidy table needs {package}: pip install 'feedbackhook[experiments]'"
        ) from error
