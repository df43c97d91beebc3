"""From the bytes of a .json or .jsonl file to one record per row, each with its exact bytes.

A malformed JSONL line is one record with a `problem`. A malformed JSON array is a `DataError` that names
the place, because nothing after the break can be told apart.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from vfl_train.data.rows import Reason, RowError, one_line
from vfl_train.errors import DataError

BOM = b"\xef\xbb\xbf"
WINDOW = 4 * 1024**2  # bytes of an array decoded at a time; grows for a larger element
MAX_ROW_BYTES = 64 * 1024**2  # of one line, or one JSON member of an archive
_CHUNK = 65536
_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls whitespace


@dataclass(slots=True)
class Record:
    """One row as found in the file: `value` is decoded JSON, unless `problem` says why there is none.
    `line` counts from 1 and is where the row starts, None where the container has no lines; `raw` are the
    row's exact bytes in the file, from byte `start` on (empty for containers that are no text)."""

    line: int | None
    raw: bytes
    value: object = None
    problem: RowError | None = None
    start: int = 0


def detect_container(file: Path) -> str:
    """Whether the file is one array, "json", or one value a line, "jsonl": by content, not by name.

    Raises:
        DataError: the file is empty or not UTF-8.
    """
    with file.open("rb") as stream:
        head = stream.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{file} is UTF-16", "save it as UTF-8")
        stream.seek(len(BOM) if head.startswith(BOM) else 0)
        lines = (line for line in iter(lambda: stream.readline(WINDOW), b"") if line.strip())
        first = next(lines, None)
        if first is None:
            raise DataError(f"{file} is empty", "give a file with at least one row")
        if not first.lstrip().startswith(b"["):
            return "jsonl"
        following = list(islice(lines, 100))
    if _decodes(first) is not None:  # a whole array on the first line: all of the file, or one odd row of it
        return "jsonl" if following else "json"
    rows_follow = any(isinstance(_decodes(line), dict) for line in following)
    return "jsonl" if rows_follow and _last_byte(file) != b"]" else "json"


def read_lines(file: Path) -> Iterator[Record]:
    """The lines of a JSONL file. A blank line is a malformed row, except at the end of the file."""
    decoder = _Decoder()
    blank: list[Record] = []  # rows only once another row follows
    with file.open("rb") as stream:
        start, number = _skip_mark(stream), 0
        while line := stream.readline(MAX_ROW_BYTES):
            number += 1
            record = _line_record(decoder, number, line.removesuffix(b"\n"), start)
            start += len(line) if line.endswith(b"\n") else _skip_rest(stream, len(line))
            if not line.strip():
                blank.append(record)
                continue
            yield from blank
            blank.clear()
            yield record


def read_array(file: Path) -> Iterator[Record]:
    """The elements of a file that is one JSON array.

    Raises:
        DataError: where the array is broken, naming element, line, column and byte.
    """
    with file.open("rb") as stream:
        scanner = _ArrayScanner(file, stream)
        while (record := scanner.next_record()) is not None:
            yield record


class _Decoder:
    """json's decoder for values inside a longer text. What is well-formed but not acceptable (NaN, endless
    integers) is left in `problem` instead of raised, so that an array can be read on behind it."""

    def __init__(self) -> None:
        self.problem = ""
        self._json = json.JSONDecoder(parse_constant=self._constant, parse_int=self._int)

    def _constant(self, name: str) -> None:
        self.problem = f"{name} is not JSON"

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's own limit on the length of integers
            self.problem = f"a number of {len(digits)} digits"
            return 0

    def decode(self, text: str, start: int) -> tuple[object, int]:
        """The value that starts at `start`, and where it ends. Raises json.JSONDecodeError."""
        self.problem = ""
        try:
            return self._json.raw_decode(text, start)
        except RecursionError as error:
            raise json.JSONDecodeError("Nested too deeply", text, start) from error

    def record(self, line: int | None, raw: bytes, value: object, start: int) -> Record:
        """The record of the value decoded last."""
        if self.problem:
            return Record(line, raw, problem=RowError(Reason.bad_json, self.problem), start=start)
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f"byte {error.start} of the row is not UTF-8"
            return Record(line, raw, problem=RowError(Reason.bad_utf8, detail), start=start)
        return Record(line, raw, value, start=start)


def decode_record(line: int | None, raw: bytes, start: int = 0) -> Record:
    """The record of one JSON value that is known by its bytes."""
    return _line_record(_Decoder(), line, raw, start)


def _line_record(decoder: _Decoder, number: int | None, raw: bytes, at: int) -> Record:
    if len(raw) >= MAX_ROW_BYTES:
        problem = RowError(Reason.text_too_long, f"the row has {MAX_ROW_BYTES} bytes or more")
        return Record(number, raw, problem=problem, start=at)
    text = raw.decode("utf-8", "surrogateescape")
    start = _skip(text, 0)
    if start == len(text):
        return Record(number, raw, problem=RowError(Reason.bad_json, "the line is blank"), start=at)
    try:
        value, end = decoder.decode(text, start)
        if _skip(text, end) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        decoder.problem = f"{error.msg} at column {error.pos + 1}"
        value = None
    if not _is_utf8(text):  # more to the point than what it does to the JSON
        decoder.problem = ""
    return decoder.record(number, raw, value, at)


class _ArrayScanner:
    """Walks the elements of a top-level JSON array and keeps count of bytes and lines.

    Text is decoded a window at a time: one wide character anywhere makes a str four times the size.
    Bytes that are not UTF-8 become lone surrogates, one each, so that byte spans stay exact. What looks
    wrong before the end of the file may only be cut off by the window, which then moves or grows; what
    is still wrong with the end of the file in view is an error.
    """

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream, self.decoder = file, stream, _Decoder()
        self.total = os.fstat(stream.fileno()).st_size
        self.size, self.count = WINDOW, 0  # window in bytes, elements so far
        self.byte, self.line = 0, 1  # of `cursor`, which counts characters
        self.line_start = 0
        self._load()
        while "[" not in self.text:  # nothing but whitespace
            if self.at_end:
                raise DataError(f"{file} is no JSON array", "repair it, or save it as JSONL")
            self._advance(len(self.text))
            self._load()
        self._advance(self.text.index("[") + 1)

    def next_record(self) -> Record | None:
        """The next element, None after the last. Raises DataError."""
        while True:
            try:
                return self._read()
            except json.JSONDecodeError as error:
                if self.at_end:
                    raise self._broken(error) from error
            if self.cursor == 0:  # nothing could be read from the whole window
                self.size *= 2
            self._load()

    def _load(self) -> None:
        self.stream.seek(self.byte)
        self.window, self.base = self.stream.read(self.size), self.byte
        self.text = self.window.decode("utf-8", "surrogateescape")
        self.cursor, self.at_end = 0, self.byte + self.size >= self.total

    def _read(self) -> Record | None:
        text, start = self.text, _skip(self.text, self.cursor)
        if text[start : start + 1] == "]":
            if not self.at_end or _skip(text, start + 1) != len(text):
                raise json.JSONDecodeError("Extra data after the array", text, start + 1)
            return None
        if self.count > 0:
            if text[start : start + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
            start = _skip(text, start + 1)
        value, end = self.decoder.decode(text, start)
        follower = _skip(text, end)
        if not self.at_end and text[follower : follower + 1] not in (",", "]"):  # a number may go on: -0|.5
            raise json.JSONDecodeError("Cut off", text, end)
        self._advance(start)
        first, line = self.byte, self.line
        self._advance(end)
        self.count += 1
        raw = self.window[first - self.base : self.byte - self.base]
        return self.decoder.record(line, raw, value, first)

    def _advance(self, cursor: int) -> None:
        passed = self.text[self.cursor : cursor]
        self.byte += len(passed.encode("utf-8", "surrogateescape"))
        if (lines := passed.count("\n")) > 0:
            self.line += lines
            behind = passed[passed.rindex("\n") + 1 :]
            self.line_start = self.byte - len(behind.encode("utf-8", "surrogateescape"))
        self.cursor = cursor

    def _broken(self, error: json.JSONDecodeError) -> DataError:
        self._advance(error.pos)
        column = self.byte - self.line_start + 1
        where = f"line {self.line}, column {column} (byte {self.byte})"
        message = f"{self.file}: the array breaks in element {self.count}, {where}: {one_line(error.msg)}"
        return DataError(message, "repair it, or save it as JSONL, where a broken row costs one row")


def _skip_mark(stream: BinaryIO) -> int:
    """Go behind the byte order mark, if there is one; returns where that is."""
    length = len(BOM) if stream.read(len(BOM)) == BOM else 0
    return stream.seek(length)


def _skip_rest(stream: BinaryIO, passed: int) -> int:
    """Go to the end of a line of which `passed` bytes were read; returns its length."""
    while piece := stream.readline(_CHUNK):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _skip(text: str, start: int) -> int:
    """The first position from `start` on that is not whitespace."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _is_utf8(text: str) -> bool:
    """Whether text decoded with surrogateescape came from proper UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decodes(line: bytes) -> object:
    """The JSON value of a line, None where it is not one."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _last_byte(file: Path) -> bytes:
    """The last byte that is not whitespace."""
    with file.open("rb") as stream:
        stream.seek(-min(file.stat().st_size, 65536), os.SEEK_END)
        return stream.read().rstrip()[-1:]
