"""Parquet shards with conversations and image bytes, read a few rows at a time.

Rows are streamed without their image bytes; those are read when an image is opened, from the row group it
lies in, in order or not. Random access therefore costs up to one row group: files with groups of some hundred
rows (what the Hub has) are good for training, one group of a million rows is not.

Not covered: a text column that a hostile dictionary page blows up.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vfl_train.data.columns import (
    Shape,
    bytes_at,
    check_columns,
    decode_names,
    embedded_columns,
    image_values,
    plain_columns,
    row_values,
    shape_of,
)
from vfl_train.data.output import replacing
from vfl_train.data.records import Record
from vfl_train.data.rows import Reason, RowError
from vfl_train.errors import ConfigError, DataError

TEXT_ROWS = 512  # read at a time, without image bytes
BATCH_BYTES = 64 * 1024**2  # of image bytes decoded at a time; at least one row
IMAGE_ROWS = 16
GROUP_ROWS = 256  # of a written file, or fewer if they reach GROUP_BYTES
GROUP_BYTES = 64 * 1024**2
KEPT_GROUPS = 4  # row groups kept open for image bytes, and for text
KEPT_ROWS = 10_000  # the rows of a larger group are not kept
_OPTIONS = {"buffer_size": 1024**2, "pre_buffer": False, "page_checksum_verification": True}
_BROKEN = (pa.ArrowException, OSError, ValueError, MemoryError, KeyError, IndexError)


class ParquetShards:
    """Parquet files of one schema, read as one."""

    kind, extension = "parquet", ".parquet"

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.groups: list[tuple[Path, int]] = []
        sizes = []
        for file in self.files:
            with _naming(file):
                metadata, schema = _open(file).metadata, _open(file).schema_arrow
                decode_names(schema)
            if file == self.files[0]:
                self.schema = schema
            elif not schema.equals(self.schema):
                message = f"{file} has other columns than {self.files[0].name}"
                raise ConfigError(message, "shards of one data set have the same columns and types")
            self.groups += [(file, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        check_columns(self.schema, self.files[0])
        self.starts = [0, *accumulate(sizes)]
        self.plain, self.embedded = plain_columns(self.schema), embedded_columns(self.schema)
        self._kept: OrderedDict[int, list[dict]] = OrderedDict()
        # Where reading stopped within a group: process, number of the next row, and the rows from it on.
        self._reached: dict[int, tuple[int, int, Iterator[dict[str, Any]]]] = {}

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reached": {}}  # an open file is no one else's

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The rows from `start` on, up to before `stop`. Raises DataError naming a damaged row group."""
        stop = len(self) if stop is None else min(stop, len(self))
        for index in range(len(self.groups)):
            first, end = max(start, self.starts[index]), min(stop, self.starts[index + 1])
            if first < end:
                for value in self._part(index, first, end):
                    yield Record(None, b"", value)

    def record(self, number: int) -> Record:
        """One row. Raises IndexError, DataError."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.files[0]} has {len(self)} rows, no row {number}")
        index = bisect.bisect_right(self.starts, number) - 1
        if self.starts[index + 1] - self.starts[index] > KEPT_ROWS:
            (value,) = self._part(index, number, number + 1)
            return Record(None, b"", value)
        if index not in self._kept:
            self._kept[index] = list(self._values(index))
            if len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return Record(None, b"", self._kept[index][number - self.starts[index]])

    def write(self, numbers: Iterable[int], path: Path) -> None:
        """Write these rows to one parquet file: schema, metadata and compression of the first shard."""
        wanted = list(numbers)
        with _naming(self.files[0]):
            metadata = _open(self.files[0]).metadata
            codec = metadata.row_group(0).column(0).compression if metadata.num_row_groups else "SNAPPY"
        with (
            replacing(path) as temporary,
            pq.ParquetWriter(temporary, self.schema, compression=_codec(codec)) as out,
        ):
            waiting: list[pa.RecordBatch] = []
            for piece in self._pieces(wanted):
                waiting.append(piece)
                rows, size = sum(p.num_rows for p in waiting), sum(p.nbytes for p in waiting)
                if rows >= GROUP_ROWS or size >= GROUP_BYTES:
                    out.write_table(pa.Table.from_batches(waiting, self.schema))
                    waiting = []
            if waiting:
                out.write_table(pa.Table.from_batches(waiting, self.schema))

    def _pieces(self, wanted: list[int]) -> Iterator[pa.RecordBatch]:
        """The wanted rows, all columns, few at a time."""
        for index, (file, group) in enumerate(self.groups):
            first, end = self.starts[index], self.starts[index + 1]
            here = wanted[bisect.bisect_left(wanted, first) : bisect.bisect_left(wanted, end)]
            if not here:
                continue
            with _naming(file, group):
                for batch in _open(file).iter_batches(IMAGE_ROWS, row_groups=[group], use_threads=False):
                    end = first + batch.num_rows
                    rows = here[bisect.bisect_left(here, first) : bisect.bisect_left(here, end)]
                    if rows:
                        yield batch.take(pa.array([row - first for row in rows]))
                    first = end

    def _part(self, index: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The rows [start, stop) of one group, by numbers of the whole. Goes on where the last part that was
        read to its end stopped, if it can: a group may hold a million rows, and be read a thousand at a
        time. Raises DataError."""
        owner, at, values = self._reached.pop(index, (0, 0, None))
        if values is None or owner != os.getpid() or at > start:
            at, values = self.starts[index], self._values(index)
        while at < stop:
            value = next(values)
            at += 1
            if at > start:
                yield value
        if at < self.starts[index + 1]:
            self._reached = {index: (os.getpid(), at, values)}
        else:
            next(values, None)  # says so if the group holds more

    def _values(self, index: int) -> Iterator[dict[str, Any]]:
        """The rows of one group, images as references. Raises DataError."""
        file, group = self.groups[index]
        rows = self.starts[index + 1] - self.starts[index]
        with _naming(file, group):
            shapes = {name: _shapes(file, group, name, rows) for name in self.embedded}
            at = 0
            reader = _open(file).iter_batches(
                TEXT_ROWS, row_groups=[group], columns=self.plain, use_threads=False
            )
            for batch in reader:
                batch.validate(full=True)
                for value in row_values(batch, self.plain):
                    for name, (leaf, found) in shapes.items():
                        make = partial(ParquetImage, str(file), group, leaf, at)
                        value[name] = image_values(found[at], make)
                    yield value
                    at += 1
            if at != rows:
                raise DataError(f"{file}: row group {group} holds {at} rows, not {rows}", "copy it again")


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """The bytes of one image: row `row` of a row group, column `leaf`, entry `position` of a list."""

    file: str
    group: int
    leaf: str
    row: int
    position: int

    def read(self) -> bytes:
        """The encoded bytes. Raises RowError if there are none, DataError if the file is damaged."""
        with _naming(Path(self.file), self.group), _lock:
            found = bytes_at(
                _cursor(self.file, self.group, self.leaf, self.row).cell(self.row), self.position
            )
        if found is None:
            raise RowError(Reason.image_missing, "the image's bytes are not there")
        return found


class _Cursor:
    """Goes through the image bytes of one row group; keeps the last few batches."""

    def __init__(self, file: Path, group: int, leaf: str) -> None:
        self.file, self.group, self.leaf = file, group, leaf
        self._restart()

    def cell(self, row: int) -> pa.Scalar:
        """The cell of a row of the group. Raises DataError, or what pyarrow raises."""
        if not self.can_reach(row):
            self._restart()
        for start, column in self.recent:
            if start <= row < start + len(column):
                return column[row - start]
        while self.next <= row:
            batch = next(self.batches, None)
            if batch is None:
                raise DataError(f"{self.file}: row group {self.group} ends before row {row}", "copy it again")
            batch.validate(full=True)
            self.recent.append((self.next, batch.column(0)))
            self.next += batch.num_rows
        start, column = self.recent[-1]
        return column[row - start]

    def can_reach(self, row: int) -> bool:
        """Whether the row lies ahead, or in a batch that is still kept."""
        return row >= self.next or any(start <= row for start, _ in self.recent)

    def _restart(self) -> None:
        rows = _batch_rows(self.file, self.group, self.leaf)
        self.batches = _open(self.file).iter_batches(
            rows, row_groups=[self.group], columns=[self.leaf], use_threads=False
        )
        self.next, self.recent = 0, deque[tuple[int, pa.Array]](maxlen=4)


_lock = threading.RLock()
_cursors: OrderedDict[tuple, list[_Cursor]] = OrderedDict()
_files: OrderedDict[tuple, pq.ParquetFile] = OrderedDict()


def _cursor(file: str, group: int, leaf: str, row: int) -> _Cursor:
    """The cursor that gets to `row` soonest. Two go through a group, because images are checked ahead of
    where they are used."""
    key = (os.getpid(), file, group, leaf)
    mine = _cursors.setdefault(key, [])
    _cursors.move_to_end(key)
    while len(_cursors) > KEPT_GROUPS:
        _cursors.popitem(last=False)
    ready = [cursor for cursor in mine if cursor.can_reach(row)]
    if ready:
        found = max(ready, key=lambda cursor: cursor.next)
        mine.remove(found)
    elif len(mine) < 2:
        found = _Cursor(Path(file), group, leaf)
    else:
        found = mine.pop(0)
    mine.append(found)  # last used
    return found


def _open(file: Path) -> pq.ParquetFile:
    """The open file; one of each process, because a forked child must not share a reader."""
    state = os.stat(file)
    key = (os.getpid(), str(file), state.st_size, state.st_mtime_ns)
    with _lock:
        found = _files.pop(key, None) or pq.ParquetFile(str(file), **_OPTIONS)
        _files[key] = found
        while len(_files) > KEPT_GROUPS:
            _files.popitem(last=False)
    return found


def _shapes(file: Path, group: int, name: str, rows: int) -> tuple[str, list[Shape]]:
    """The leaf column with the bytes, and what images each row of the group has.

    Where the paths are stored too, they and the column's statistics tell it; else the bytes are gone through.
    """
    leaf, path = _leaves(_open(file), name)
    column = _column(file, group, leaf)
    if path is not None and column is not None and column.statistics is not None:
        read = _open(file).iter_batches(TEXT_ROWS, row_groups=[group], columns=[path], use_threads=False)
        shapes = [shape_of(cell, has_bytes=True) for batch in read for cell in batch.column(0)]
        entries = [e for s in shapes for e in (s if isinstance(s, list) else [s]) if e is not None]
        if column.statistics.has_null_count:
            nulls = _slots(shapes) - column.statistics.null_count
            if nulls == len(entries):
                return leaf, _filled(shapes, rows, file, group)
            if nulls == 0:
                return leaf, _filled([_without_bytes(s) for s in shapes], rows, file, group)
    shapes = []
    size = _batch_rows(file, group, leaf)
    columns = [leaf] if path is None else [leaf, path]
    for batch in _open(file).iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
        shapes += [shape_of(cell) for cell in batch.column(0)]
    return leaf, _filled(shapes, rows, file, group)


def _slots(shapes: list[Shape]) -> int:
    """Values that the leaf column stores for these rows, nulls included."""
    return sum(max(1, len(shape)) if isinstance(shape, list) else 1 for shape in shapes)


def _without_bytes(shape: Shape) -> Shape:
    if isinstance(shape, list):
        return [None if entry is None else (False, entry[1]) for entry in shape]
    return None if shape is None else (False, shape[1])


def _filled(shapes: list[Shape], rows: int, file: Path, group: int) -> list[Shape]:
    if len(shapes) != rows:
        raise DataError(
            f"{file}: row group {group} holds {len(shapes)} images' rows, not {rows}", "copy it again"
        )
    return shapes


def _leaves(file: pq.ParquetFile, name: str) -> tuple[str, str | None]:
    """The names of the leaf columns with the bytes and with the paths of an image column."""
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    mine = [leaf for leaf in leaves if leaf == name or leaf.startswith(f"{name}.")]
    found = next((leaf for leaf in mine if leaf.endswith(".bytes")), mine[0])
    return found, next((leaf for leaf in mine if leaf.endswith(".path")), None)


def _column(file: Path, group: int, leaf: str) -> Any:
    row_group = _open(file).metadata.row_group(group)
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return next((column for column in columns if column.path_in_schema == leaf), None)


def _batch_rows(file: Path, group: int, leaf: str) -> int:
    """Rows to decode at a time. One value may be as large as the whole column and be repeated by a
    dictionary, so the column's size, not the mean of its values, is what counts."""
    column = _column(file, group, leaf)
    size = 0 if column is None else max(column.total_uncompressed_size, 0)
    return max(1, min(IMAGE_ROWS, BATCH_BYTES // max(1, size)))


def _codec(name: str) -> str:
    return {"UNCOMPRESSED": "none", "LZ4_RAW": "lz4"}.get(name, name.lower())


@contextmanager
def _naming(file: Path, group: int | None = None) -> Iterator[None]:
    """Says which file and row group is damaged. Raises DataError."""
    try:
        yield
    except (DataError, ConfigError, RowError):
        raise
    except _BROKEN as error:
        where = f"{file}" if group is None else f"{file}: row group {group}"
        message = f"{where} cannot be read as parquet ({type(error).__name__})"
        raise DataError(message, "copy the file again; it is damaged") from error
