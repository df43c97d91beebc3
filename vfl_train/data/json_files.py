"""The containers .json (one array) and .jsonl: rows by number, written back byte for byte.

Byte equality: a JSONL row is its line without the closing "\\n" (a "\\r" before it belongs to the row)
and is written back with one "\\n". An array's element is its bytes from first to last character; elements
are written one a line, joined by ",\\n". A byte order mark at the start of the file is no part of a row.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from vfl_train.data.output import write_file
from vfl_train.data.records import Record, decode_record, read_array, read_lines
from vfl_train.errors import DataError


class JsonFile:
    """One .json or .jsonl file (`kind` "json" or "jsonl"). Of a row it keeps where it lies: 24 bytes."""

    def __init__(self, file: Path, kind: str) -> None:
        self.file, self.kind = file, kind
        self.files: tuple[Path, ...] = (file,)
        self.extension = file.suffix or f".{kind}"
        self._starts, self._sizes, self._lines = array("q"), array("q"), array("q")
        self._complete = False
        self._state = _state(file)

    def __len__(self) -> int:
        if not self._complete:
            for _ in self.records():
                pass
        return len(self._starts)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The rows from `start` on, up to before `stop`, in order."""
        known = len(self._starts)
        if start and start <= known:  # only the rest has to be looked for
            end = known if stop is None else min(known, stop)
            for number, raw in zip(range(start, end), self._raws(range(start, end)), strict=True):
                yield decode_record(self._lines[number], raw, self._starts[number])
            if self._complete or end == stop:
                return
            start = end
        self._check()
        read = read_array if self.kind == "json" else read_lines
        for number, record in enumerate(read(self.file)):
            if stop is not None and number >= stop:
                return
            self._note(number, record)
            if number >= start:
                yield record
        self._complete = True

    def record(self, number: int) -> Record:
        """One row. Raises IndexError past the end, DataError if the file was changed since it was opened."""
        raw = next(self._raws([number]))
        return decode_record(self._lines[number], raw, self._starts[number])

    def write(self, numbers: Iterable[int], path: Path) -> None:
        """Write the rows of these numbers, which ascend, to a new file. Raises DataError, DiskError."""
        rows = self._raws(numbers)
        if self.kind == "jsonl":
            write_file(path, (raw + b"\n" for raw in rows))
        else:
            write_file(path, _as_array(rows))

    def _raws(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """The bytes of these rows. Raises IndexError, and DataError if the file was changed meanwhile."""
        with self.file.open("rb", buffering=0) as stream:
            for number in numbers:
                if number >= len(self._starts) and number >= len(self):
                    raise IndexError(f"{self.file} has {len(self)} rows, no row {number}")
                self._check()
                stream.seek(self._starts[number])
                yield stream.read(self._sizes[number])

    def _note(self, number: int, record: Record) -> None:
        if number == len(self._starts):
            self._starts.append(record.start)
            self._sizes.append(len(record.raw))
            self._lines.append(record.line or 0)

    def _check(self) -> None:
        if _state(self.file) != self._state:
            raise DataError(f"{self.file} was changed while it was read", "start again")


def _as_array(rows: Iterable[bytes]) -> Iterator[bytes]:
    yield b"["
    for position, raw in enumerate(rows):
        yield (b",\n" if position else b"\n") + raw
    yield b"\n]\n"


def _state(file: Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns
