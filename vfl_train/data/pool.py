"""A data set opened for streaming: rows in input order, rows by number, and the same rows written back.

    pool = open_pool("train.jsonl", image_root="images")
    for entry in pool.iterate():          # Row | Rejected, one for every row of the input, in input order
        ...
    row = pool.row(17)                    # random access by row number
    pool.write([3, 17], "selected.jsonl") # in the input's own format

In memory are positions only, some bytes a row. Nothing is fetched, and no image is opened unless
`check_images` asks for it: an image is a path, or a place in the data file (`ImageRef.member`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

from vfl_train.data.images import RejectedImage, resolve_image, verify_image
from vfl_train.data.parse import ParsedRow, parse_row
from vfl_train.data.records import Record
from vfl_train.data.rows import (
    ImageRef,
    Rejected,
    Row,
    RowError,
    reject,
    row_id,
    row_source,
    row_uid,
)
from vfl_train.data.videos import verify_videos
from vfl_train.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FIX_FORMAT = "see `vfl-train data --help` for the formats that can be read"
MAX_THREADS = 8  # decoding an image leaves Python's lock
AHEAD = 256  # rows whose images are decoded while earlier ones are handed out
HEAD = 1000  # rows looked at to tell where images are named


class Container(Protocol):
    """A kind of data file, or several of it that are read as one. Rows are numbered through from 0."""

    kind: str  # "jsonl", "json", "parquet", "arrow" or "tar"
    files: tuple[Path, ...]
    extension: str  # of what `write` writes; "" for a folder

    def __len__(self) -> int: ...

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The rows from `start` on, up to before `stop`. Raises DataError where the file is damaged."""

    def record(self, number: int) -> Record:
        """One row. Raises IndexError, DataError."""

    def write(self, numbers: Iterable[int], path: Path) -> None:
        """Write the rows of these ascending numbers, values unchanged. Raises DataError, DiskError."""


class Pool:
    """A data set; see `open_pool`. `format` is dialect and container, such as "llava-jsonl"."""

    def __init__(self, path: Path, container: Container, image_root: Path) -> None:
        self.path, self.container, self.image_root = path, container, image_root
        self.extension = container.extension
        self._root = os.path.realpath(image_root)
        self._store = _blobs(Path(self._root))
        self._stem = path.stem if path.suffix else path.name
        self._dialect = _Dialect(path)
        self.format = f"{self._look_ahead()}-{container.kind}"

    def __len__(self) -> int:
        """Rows of the input, usable or not. Text files are read through for it, once."""
        return len(self.container)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of several, of their names and hashes."""
        files = self.container.files
        if len(files) == 1:
            return _sha256(files[0])
        lines = (f"{_sha256(file)}  {file.name}\n" for file in files)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def iterate(
        self, start: int = 0, stop: int | None = None, check_images: bool = False
    ) -> Iterator[Row | Rejected]:
        """Every row from number `start` on, up to before `stop`, in input order: usable or quarantined.

        Args:
            check_images: decode every image once, in threads, so that none fails in a later step.

        Raises:
            DataError: rows of two formats, or a damaged file, naming the place.
        """
        records = self.container.records(start, stop)
        outcomes = (self._outcome(record, number) for number, record in enumerate(records, start))
        return ImageCheck().apply(outcomes) if check_images else outcomes

    def row(self, number: int) -> Row | Rejected:
        """The row of this number; its images are not checked. Raises IndexError past the end, DataError."""
        if number < 0:
            raise IndexError(f"there is no row {number}")
        return self._outcome(self.container.record(number), number)

    def write(self, numbers: Iterable[int], path: str | os.PathLike) -> None:
        """Write the rows of these numbers, in input order, in the input's own format: `path` is a file with
        `extension`, or a folder where that is "". All or nothing; what is there is replaced.

        Raises:
            DiskError: it cannot be written.
        """
        self.container.write(sorted(set(numbers)), Path(path))

    def _outcome(self, record: Record, number: int) -> Row | Rejected:
        """Everything about one row but the decoding of its images."""
        value = record.value
        name = row_id(value, number)
        try:
            if record.problem is not None:
                raise record.problem
            parsed = parse_row(value)
            self._dialect.add(parsed, number, record.line)
            source = row_source(value, self._stem)
            return Row(
                row=number,
                uid=row_uid(source, number, value),
                source=source,
                messages=parsed.messages,
                images=tuple(resolve_image(image, self._root, self._store) for image in parsed.images),
                raw=record.raw,
                videos=tuple(
                    tuple(resolve_image(frame, self._root, self._store) for frame in frames)
                    for frames in parsed.videos
                ),
                id=name,
                line=record.line,
            )
        except RowError as error:
            return Rejected(row=number, id=name, code=error.code, detail=error.detail, line=record.line)

    def _look_ahead(self) -> str:
        """The dialect of the first rows. Raises DataError if no row of the file is well-formed."""
        first: Rejected | None = None
        seen = 0
        for seen, record in enumerate(self.container.records(), start=1):
            try:
                if record.problem is not None:
                    raise record.problem
                self._dialect.add(parse_row(record.value), seen - 1, record.line)
            except RowError as error:
                first = first or Rejected(seen - 1, "", error.code, error.detail, record.line)
            if self._dialect.is_settled or (self._dialect.family and seen >= HEAD):
                break
        if self._dialect.family:
            return self._dialect.name
        if first is None:
            raise DataError(f"{self.path} holds no rows", "give a file with at least one row")
        where = f"row {first.row}" if first.line is None else f"line {first.line}"
        why = f"; {where}: {first.detail}"
        raise DataError(f"{self.path}: none of {seen} rows is of a known format{why}", FIX_FORMAT)


def open_pool(path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> Pool:
    """Open a data set. Its format is detected from its content, and logged.

    Args:
        path: a file, a folder, a pattern or a data set of the Hub (`containers.open_container`).
        image_root: folder under which image paths lie; None is the folder of the data.

    Raises:
        ConfigError: no such file or folder, or a format that cannot be read.
        DataError: an empty or damaged file, or no row of a known format.
    """
    from vfl_train.data.containers import open_container

    found, container = open_container(path)
    root = (found if found.is_dir() else found.parent) if image_root is None else Path(image_root)
    if not root.is_dir():
        raise ConfigError(f"the image root {root} is not a folder", "check --image-root")
    pool = Pool(found, container, root)
    log.info("%s: format %s", pool.path, pool.format)
    return pool


def iterate(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    check_images: bool = False,
    limit: int | None = None,
) -> Iterator[Row | Rejected]:
    """Stream a data set: one `Row` or `Rejected` for each of its rows (the first `limit`), in input order.

    Arguments and errors as in `open_pool` and `Pool.iterate`.
    """
    yield from open_pool(path, image_root).iterate(0, limit, check_images)


class ImageCheck:
    """Decodes the images of rows in threads, each once, and quarantines the rows whose images fail."""

    def __init__(self) -> None:
        self._verdicts: dict[object, RejectedImage | None] = {}

    def apply(self, outcomes: Iterable[Row | Rejected]) -> Iterator[Row | Rejected]:
        """The same rows in the same order, with those quarantined of which an image cannot be decoded."""
        waiting: deque[tuple[Row | Rejected, list[Future]]] = deque()
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
            for outcome in outcomes:
                refs = outcome.pictures if isinstance(outcome, Row) else ()
                futures: list[Future] = [threads.submit(self._problem, ref) for ref in refs]
                if isinstance(outcome, Row) and outcome.videos:
                    futures.append(threads.submit(verify_videos, outcome.videos))
                waiting.append((outcome, futures))
                if len(waiting) > AHEAD:
                    yield _checked(*waiting.popleft())
            while waiting:
                yield _checked(*waiting.popleft())

    def _problem(self, ref: ImageRef) -> RejectedImage | None:
        # The hash stands for the path: a dictionary of a million paths would be most of the memory used.
        key = hash(str(ref.path)) if ref.path is not None else None
        if key is not None and key in self._verdicts:
            found = self._verdicts[key]
            return None if found is None else RejectedImage(found.code, found.detail)
        if (
            ref.path is not None
        ):  # rows name one file in different ways, and reports must not depend on the first
            ref = ImageRef(ref.path, None, ref.path.name)
        problem = None
        try:
            verify_image(ref)
        except RejectedImage as error:
            problem = error.with_traceback(None)
        if key is not None:
            self._verdicts[key] = problem
        return problem


def _checked(outcome: Row | Rejected, futures: list[Future]) -> Row | Rejected:
    if isinstance(outcome, Rejected):
        return outcome
    problem = next((found for future in futures if (found := future.result()) is not None), None)
    return outcome if problem is None else reject(outcome, problem)


class _Dialect:
    """The dialect of a data set, from its well-formed rows: one family, and where images are named."""

    def __init__(self, path: Path) -> None:
        self.path, self.family, self.image_key = path, "", ""

    def add(self, parsed: ParsedRow, number: int, line: int | None) -> None:
        """Take note of one well-formed row. Raises DataError if it is of another family than the others."""
        self.family = self.family or parsed.family
        if parsed.family != self.family:
            where = f"row {number}" if line is None else f"line {line}"
            message = f"{self.path} mixes formats: {where} has `{parsed.family}`, not `{self.family}`"
            raise DataError(message, "split the file into one per format")
        self.image_key = self.image_key or parsed.image_key

    @property
    def is_settled(self) -> bool:
        """Whether no further row can change the name."""
        return self.family == "messages" or bool(self.family and self.image_key)

    @property
    def name(self) -> str:
        """llava, sharegpt or messages."""
        if self.family == "messages":
            return "messages"
        return "sharegpt" if self.image_key == "images" else "llava"


def _blobs(root: Path) -> Path | None:
    """Where the files of a snapshot in the Hub's cache really lie; None for other folders."""
    blobs = root.parent.parent / "blobs"
    return blobs if root.parent.name == "snapshots" and blobs.is_dir() else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
