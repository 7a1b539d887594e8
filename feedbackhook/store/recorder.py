"""The tidy table of a run: one row per measured value, in Parquet part files that survive a kill."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from feedbackhook.store.atomic import atomic_write
from feedbackhook.store.errors import StoreError
from feedbackhook.store.locks import FolderLock
from feedbackhook.store.renamed import refuse_renamed_metrics
from feedbackhook.store.tracking import Row, Tracker, TrackerName

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from torch import Tensor

__all__ = ["COLUMNS", "Recorder", "parts_of", "read", "schema"]

COLUMNS = ("run", "step", "epoch", "layer", "depth", "metric", "value")


class Recorder:
    """Writes the table of one run: `run, step, epoch, layer, depth, metric, value`.

    Rows wait in memory for `interval` seconds, for :meth:`flush`, or for the end of the `with` block, and are
    then written as one more `metrics/part-00000.parquet` of the run folder. Each part is written in one
    piece, so a killed process loses no more than the rows that were waiting. Only one recorder can be open in
    a folder; the lock ends with the process. In a distributed run only rank 0 writes, and in the other
    processes every call does nothing.

    Args:
        folder: the run folder; created if it is missing.
        run: the name of the run; default: the name of the folder.
        append: add to the table that the folder already holds, as a training does that resumes from a
            checkpoint; drop the rows after the checkpoint with :meth:`drop_after`.
        interval: seconds between writes to disk.
        tensorboard: also write each row as a scalar to `tensorboard/` in the run folder, and histograms of V,
            W and gradients at each step that :meth:`feedbackhook.Patch.watch` records.
        tracking: also send each row to `trackio` or `wandb`, when it is written to disk; see
            :class:`feedbackhook.store.tracking.Tracker`.
        settings: the configuration of the run, for the tracker.

    Attributes:
        epoch: the current epoch, for the rows of :meth:`feedbackhook.Patch.watch`; set it in your loop.
        histograms: whether histograms are written. It is the same on every rank, since all ranks take part in
            gathering a sharded tensor.

    Raises:
        BlockingIOError: another recorder is open in this folder.
        FileExistsError: the folder already holds a table, and `append` is False.
        ImportError: pyarrow is not installed, or TensorBoard or the tracker, if it is asked for.
        ValueError: there is no such tracker.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        run: str | None = None,
        append: bool = False,
        interval: float = 30.0,
        tensorboard: bool = False,
        tracking: TrackerName | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        _pyarrow()
        if tracking not in (None, *get_args(TrackerName)):
            raise ValueError(f"tracking must be 'trackio' or 'wandb', not {tracking!r}")
        folder = Path(folder).resolve()
        self.run = folder.name if run is None else run
        self.epoch = 0
        self._interval = interval
        self._parts = folder / "metrics"
        self._rows: list[Row] = []
        self._written = self._touched = time.monotonic()
        self._closed = False
        self._lock: FolderLock | None = None
        self._board: Any = None
        self._tracker: Tracker | None = None
        self.histograms = tensorboard
        if _rank():
            return
        board = _summary_writer() if tensorboard else None
        self._parts.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        if not append and any(self._parts.glob("part-*.parquet")):
            self.close()
            raise FileExistsError(
                f"{folder} already holds the table of a run: choose another folder, or pass append=True to "
                "add to it"
            )
        for unfinished in self._parts.glob(".part-*"):
            unfinished.unlink()
        if board is not None:
            self._board = board(str(folder / "tensorboard"))
        if tracking is not None:
            self._tracker = self._open_tracker(tracking, folder, settings)

    def _open_tracker(
        self, package: TrackerName, folder: Path, settings: Mapping[str, Any] | None
    ) -> Tracker:
        opened = False
        try:
            tracker = Tracker(package, folder, self.run, settings)
            opened = True
        finally:
            if not opened:
                self.close()
        return tracker

    def add(
        self,
        step: int,
        epoch: int,
        metric: str,
        value: float,
        layer: str | None = None,
        depth: int | None = None,
    ) -> None:
        """Add one row.

        Args:
            step: number of optimizer steps done.
            epoch: the epoch; 0: before training.
            metric: name of the metric.
            value: its value.
            layer: name of the layer, for a metric of one layer.
            depth: position of that layer; 0: nearest to the input.

        Raises:
            ValueError: the recorder is closed.
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
        """Write the waiting rows if the interval is over."""
        if self._rows and time.monotonic() - self._written >= self._interval:
            self.flush()

    def touch_if_due(self) -> None:
        """Touch the lock file once per interval, to show that this process is at work."""
        if self._lock is not None and time.monotonic() - self._touched >= self._interval:
            self._lock.touch()
            self._touched = time.monotonic()

    def add_histogram(self, step: int, name: str, values: Tensor) -> None:
        """Add a histogram to TensorBoard, if that is on and all values are finite.

        Gather a sharded tensor first.
        """
        if self._board is not None and bool(values.isfinite().all()):
            self._board.add_histogram(name, values.float(), int(step))

    def flush(self) -> None:
        """Write the waiting rows to disk, as one part file."""
        if self._rows:
            columns = [list(column) for column in zip(*self._rows, strict=True)]
            table = _pyarrow().table(columns, schema=schema())
            _write_part(table, self._parts / _part_name(len(parts_of(self._parts))))
            if self._tracker is not None:
                self._tracker.log(self._rows)
            self._rows.clear()
        if self._board is not None:
            self._board.flush()
        self._written = time.monotonic()

    def drop_after(self, step: int, epoch: int | None = None) -> None:
        """Remove all rows after `step` or after `epoch`, which a run that resumes from a checkpoint repeats.

        Parts are replaced one by one, the last one first, so that a kill halfway does no harm. Events of
        TensorBoard stay.
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
        """Flush and release the folder; closing twice is fine."""
        self._closed = True
        if self._lock is not None:
            try:
                self.flush()
            finally:
                self._lock.release()
                self._lock = None
                if self._board is not None:
                    self._board.close()
                if self._tracker is not None:
                    self._tracker.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(folder: str | os.PathLike[str]) -> pandas.DataFrame:
    """Return the table of a run folder, or of all runs under a folder, as a pandas `DataFrame`.

    `layer` is missing and `depth` (Int64) is `<NA>` in rows about the whole network.

    Raises:
        FileNotFoundError: there is no table in this folder.
        ValueError: a part file is damaged, missing or of an earlier version, or two runs have the same name;
            the message names the files.
        ImportError: pandas or pyarrow is not installed.
    """
    pa = _pyarrow()
    _require("pandas")
    folders = [folder_ for folder_ in sorted(Path(folder).rglob("metrics")) if parts_of(folder_)]
    if not folders:
        raise FileNotFoundError(
            f"no table in {Path(folder).resolve()}: it is neither a run folder (metrics/part-00000.parquet) "
            "nor does it contain one"
        )
    tables = []
    owner: dict[str, Path] = {}
    for metrics in folders:
        table = pa.concat_tables([_read_part(part) for part in parts_of(metrics)])
        refuse_renamed_metrics(metrics, table.column("metric").unique().to_pylist())
        tables.append(table)
        for run in table.column("run").unique().to_pylist():
            if run in owner:
                raise StoreError(
                    f"two runs are named {run!r}: {owner[run].parent} and {metrics.parent}; read them one "
                    "at a time"
                )
            owner[run] = metrics
    return pa.concat_tables(tables).to_pandas().astype({"depth": "Int64"})


def _rank() -> int:
    """Return the rank of this process in a distributed run; 0 if there is none."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))  # set by torchrun, before the process group exists


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard=True needs TensorBoard: pip install 'feedbackhook[tensorboard]'"
        ) from error
    return SummaryWriter


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def parts_of(folder: Path) -> list[Path]:
    """Return the part files of a `metrics` folder in order.

    Raises:
        StoreError: a part is missing.
    """
    try:
        names = sorted(filter(re.compile(r"part-.*\.parquet").fullmatch, os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    parts = [folder / name for name in names]
    for number, name in enumerate(names):
        if name != _part_name(number):
            raise StoreError(f"{folder / _part_name(number)} is missing, but later parts of its table exist")
    return parts


def _write_part(table: pyarrow.Table, path: Path) -> None:
    import pyarrow.parquet

    with atomic_write(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, write_page_checksum=True)


def _read_part(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if not table.schema.equals(schema()):
        raise StoreError(
            f"{path} is not part of a metrics table: its columns are {table.column_names} instead of "
            f"{list(COLUMNS)}"
        )
    return table


def schema() -> pyarrow.Schema:
    """Return the columns of the table and their types."""
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
