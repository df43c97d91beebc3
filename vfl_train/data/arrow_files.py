"""Arrow files and the folders that `datasets.Dataset.save_to_disk` writes, mapped into memory.

Nothing in them is trusted: files are taken from the folder itself only, and each batch is validated before
a value is touched, because Arrow's buffers are read in place.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from vfl_train.data.columns import (
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

STATE, INFO = "state.json", "dataset_info.json"
FILE_MAGIC = b"ARROW1"
_PIECE = 256  # rows turned into Python values at a time


class ArrowFiles:
    """Arrow files of one schema, read as one: those of a `datasets` folder, or given one by one."""

    kind = "arrow"

    def __init__(self, files: Iterable[Path], folder: Path | None = None) -> None:
        self.files, self.folder = tuple(files), folder
        self.extension = ".arrow" if folder is None else ""
        self.batches: list[tuple[str, int]] = []
        sizes = []
        for file in self.files:
            found = _batches(str(file), _state(file))
            if file == self.files[0]:
                self.schema = found.schema
            elif not found.schema.equals(self.schema):
                message = f"{file} has other columns than {self.files[0].name}"
                raise ConfigError(message, "shards of one data set have the same columns and types")
            self.batches += [(str(file), index) for index in range(len(found.batches))]
            sizes += [batch.num_rows for batch in found.batches]
        check_columns(self.schema, self.files[0])
        self.starts = [0, *accumulate(sizes)]
        self.plain, self.embedded = plain_columns(self.schema), embedded_columns(self.schema)

    def __len__(self) -> int:
        return self.starts[-1]

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The rows from `start` on, up to before `stop`, in order."""
        stop = len(self) if stop is None else min(stop, len(self))
        for index, first in enumerate(self.starts[:-1]):
            end = min(self.starts[index + 1], stop)
            for at in range(max(first, start), end, _PIECE):
                yield from self._records(index, at - first, min(_PIECE, end - at))

    def record(self, number: int) -> Record:
        """One row. Raises IndexError past the end."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.files[0]} has {len(self)} rows, no row {number}")
        index = bisect.bisect_right(self.starts, number) - 1
        return next(self._records(index, number - self.starts[index], 1))

    def write(self, numbers: Iterable[int], path: Path) -> None:
        """Write these rows as one Arrow stream, and the JSON files of a `datasets` folder beside it."""
        wanted = list(numbers)
        with replacing(path) as temporary:
            if self.folder is None:
                self._write_stream(wanted, temporary)
                return
            temporary.mkdir()
            name = "data-00000-of-00001.arrow"
            self._write_stream(wanted, temporary / name)
            for file, value in _folder_files(self.folder, name).items():
                (temporary / file).write_text(json.dumps(value, indent=2), encoding="utf-8")

    def _write_stream(self, wanted: list[int], path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, self.schema) as out:
            for index, (file, batch) in enumerate(self.batches):
                first, end = self.starts[index], self.starts[index + 1]
                here = wanted[bisect.bisect_left(wanted, first) : bisect.bisect_left(wanted, end)]
                if here:
                    found = _batch(file, batch).take(pa.array([number - first for number in here]))
                    out.write_batch(found)

    def _records(self, index: int, first: int, count: int) -> Iterator[Record]:
        file, batch = self.batches[index]
        with _naming(file):
            piece = _batch(file, batch).slice(first, count)
            columns = {name: piece.column(name) for name in self.embedded}
            for at, value in enumerate(row_values(piece, self.plain)):
                for name, column in columns.items():
                    make = partial(ArrowImage, file, batch, name, first + at)
                    value[name] = image_values(shape_of(column[at]), make)
                yield Record(None, b"", value)


@dataclass(frozen=True, slots=True)
class ArrowImage:
    """The bytes of one image: a row of a batch of a file, a column, and the entry of a list."""

    file: str
    batch: int
    column: str
    row: int
    position: int

    def read(self) -> bytes:
        """The encoded bytes. Raises RowError if there are none, DataError if the file is damaged."""
        found = bytes_at(_batch(self.file, self.batch).column(self.column)[self.row], self.position)
        if found is None:
            raise RowError(Reason.image_missing, "the image's bytes are not there")
        return found


@dataclass(frozen=True)
class _Mapped:
    schema: pa.Schema
    batches: list[pa.RecordBatch]


def _batch(file: str, index: int) -> pa.RecordBatch:
    return _batches(file, _state(Path(file))).batches[index]


def _state(file: Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=1024)
def _batches(file: str, state: tuple[int, int]) -> _Mapped:
    """The batches of a file, mapped and validated. Raises DataError."""
    with _naming(file):
        source = pa.memory_map(file, "r")
        if source.read(len(FILE_MAGIC)) == FILE_MAGIC:
            reader = pa.ipc.open_file(source)
            found = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            found = list(reader)
        decode_names(reader.schema)
        for batch in found:
            batch.validate(full=True)
        return _Mapped(reader.schema, found)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Says which file is damaged. Raises DataError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError, IndexError) as error:
        message = f"{file} cannot be read as Arrow ({type(error).__name__})"
        raise DataError(message, "copy the file again; it is damaged") from error


def folder_files(folder: Path) -> list[Path]:
    """The data files of a `datasets` folder in its order. Raises DataError for one that lies elsewhere."""
    state = _json(folder / STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{folder / STATE} lists no data files", "save the data set again")
    return [
        _data_file(folder, entry.get("filename") if isinstance(entry, dict) else None) for entry in listed
    ]


def _data_file(folder: Path, name: object) -> Path:
    """A file of this folder itself, which no link leads out of."""
    fix = "data files lie in the folder of their state.json"
    plain = isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")
    if not isinstance(name, str) or not plain or "\0" in name or "\\" in name:
        raise DataError(f"{folder / STATE} names the data file {ascii(name)[:80]}", fix)
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{file} leads out of the folder", fix)
    if not file.is_file():
        raise DataError(f"{file} is not there", "copy the folder again")
    return file


def _folder_files(folder: Path, data: str) -> dict[str, Any]:
    """state.json and dataset_info.json of a part of the data set in `folder`."""
    state, info = _json(folder / STATE), _json(folder / INFO)
    state.update(_data_files=[{"filename": data}], _fingerprint=os.urandom(8).hex(), _indices_data_files=None)
    for key in ("splits", "dataset_size", "download_size", "size_in_bytes", "download_checksums"):
        info.pop(key, None)  # they are of the whole
    return {STATE: state, INFO: info}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read: {type(error).__name__}", "save the data set again"
        ) from error
