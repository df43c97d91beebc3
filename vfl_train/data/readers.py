"""Read a training set from JSON or JSONL, and write parts of it back byte for byte.

Every row that is read ends up in exactly one of two lists, kept or quarantined; a `Dataset` where that is
not so cannot be made.

Byte equality: a JSONL row is its line without the closing "\\n" (a "\\r" before it belongs to the row)
and is written back with one "\\n". An array's element is its bytes from first to last character; elements
are written one a line, joined by ",\\n". A byte order mark at the start of the file is no part of a row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from vfl_train.data.images import RejectedImage, resolve_image, verify_image
from vfl_train.data.records import Record, detect_container, read_array, read_lines
from vfl_train.data.rows import (
    ImageRef,
    ParsedRow,
    Rejected,
    Row,
    RowError,
    parse_row,
    reject,
    row_id,
    row_source,
    row_uid,
)
from vfl_train.errors import ConfigError, DataError, DiskError
from vfl_train.progress import track

log = logging.getLogger(__name__)

FIX_FORMAT = "what works today: LLaVA, ShareGPT and messages rows as .json (one array) or .jsonl"
UNSUPPORTED = (".parquet", ".tar", ".arrow", ".gz", ".zip", ".csv", ".tsv")
MAX_THREADS = 8  # decoding an image leaves Python's lock


@dataclass(frozen=True)
class Dataset:
    """A data file, read. `rows` and `rejected` are in input order and share no row; `format` is the dialect
    and the container, such as "llava-jsonl"; `sha256` is of the whole file."""

    path: Path
    format: str
    rows: list[Row] = field(repr=False)
    rejected: list[Rejected] = field(repr=False)
    sha256: str
    n_read: int
    image_root: Path

    def __post_init__(self) -> None:
        positions = {row.row for row in self.rows} | {row.row for row in self.rejected}
        if not len(self.rows) + len(self.rejected) == len(positions) == self.n_read:
            counts = f"{self.n_read} read, {len(self.rows)} kept, {len(self.rejected)} quarantined"
            raise RuntimeError(f"{self.path}: rows were lost or counted twice: {counts}")

    def counts(self) -> dict[str, int]:
        """Quarantined rows per reason code, most frequent first, then by name."""
        tally = Counter(str(entry.code) for entry in self.rejected)
        return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> str:
        """One line: `2000 read = 1712 kept + 288 quarantined (image_truncated 41, ...)`."""
        reasons = ", ".join(f"{code} {count}" for code, count in self.counts().items())
        return f"{self.totals()} ({reasons})" if reasons else self.totals()

    def totals(self) -> str:
        """`2000 read = 1712 kept + 288 quarantined`."""
        return f"{self.n_read} read = {len(self.rows)} kept + {len(self.rejected)} quarantined"


def read_dataset(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    check_images: bool = True,
    limit: int | None = None,
) -> Dataset:
    """Read a data file. Its format is detected from its content, and logged.

    Args:
        path: a .json or .jsonl file.
        image_root: folder under which image paths lie; None is the data file's own folder.
        check_images: decode every image once, in threads, so that none fails in the middle of a training;
            without it, images are only looked up.
        limit: read only the first so many rows.

    Raises:
        ConfigError: no such file or folder, or a format that is not supported yet.
        DataError: an empty file, rows of no known format or of two, or a broken JSON array.
    """
    file, root = _input_file(path), _image_folder(path, image_root)
    container = detect_container(file)
    records = read_array(file) if container == "json" else read_lines(file)
    outcomes: list[Row | Rejected] = []
    dialect = _Dialect(file)
    for record in islice(records, limit):
        outcomes.append(_read_row(record, len(outcomes), file.stem, root, dialect))
    name = dialect.name(outcomes)
    if check_images:
        outcomes = _with_images_checked(outcomes)
    dataset = Dataset(
        path=file,
        format=f"{name}-{container}",
        rows=[outcome for outcome in outcomes if isinstance(outcome, Row)],
        rejected=[outcome for outcome in outcomes if isinstance(outcome, Rejected)],
        sha256=_sha256(file),
        n_read=len(outcomes),
        image_root=root,
    )
    log.info("%s: format %s, %s", file, dataset.format, dataset.summary())
    return dataset


def write_selected(dataset: Dataset, rows: Iterable[Row], path: str | os.PathLike) -> None:
    """Write `rows` in the dataset's own format, in input order, each byte for byte as it was read.

    Raises:
        DiskError: the file cannot be written.
    """
    ordered = sorted(rows, key=lambda row: row.row)
    if dataset.format.endswith("-jsonl"):
        _write(Path(path), (row.raw + b"\n" for row in ordered))
        return
    elements = ((b",\n" if position else b"\n") + row.raw for position, row in enumerate(ordered))
    _write(Path(path), chain([b"["], elements, [b"\n]\n"]))


def write_quarantine(rejected: Iterable[Rejected], path: str | os.PathLike) -> None:
    """Write quarantine.jsonl: one object a line with row, line, id, code and detail, in input order.

    Raises:
        DiskError: the file cannot be written.
    """
    ordered = sorted(rejected, key=lambda entry: entry.row)
    _write(Path(path), (json.dumps(entry.as_dict()).encode("ascii") + b"\n" for entry in ordered))


class _Dialect:
    """The dialect of a file, from its well-formed rows: one family, and where images are named."""

    def __init__(self, file: Path) -> None:
        self.file, self.family, self.image_key = file, "", ""

    def add(self, parsed: ParsedRow, line: int) -> None:
        """Take note of one well-formed row. Raises DataError if it is of another family than the others."""
        self.family = self.family or parsed.family
        if parsed.family != self.family:
            message = f"{self.file} mixes formats: line {line} has `{parsed.family}`, not `{self.family}`"
            raise DataError(message, "split the file into one per format")
        self.image_key = self.image_key or parsed.image_key

    def name(self, outcomes: list[Row | Rejected]) -> str:
        """llava, sharegpt or messages. Raises DataError if no row is well-formed."""
        if self.family == "messages":
            return "messages"
        if self.family == "conversations":
            return "sharegpt" if self.image_key == "images" else "llava"
        if not outcomes:
            raise DataError(f"{self.file} holds no rows", "give a file with at least one row")
        first = outcomes[0]
        why = f"; line {first.line}: {first.detail}" if isinstance(first, Rejected) else ""
        raise DataError(f"{self.file}: none of {len(outcomes)} rows is of a known format{why}", FIX_FORMAT)


def _read_row(record: Record, position: int, stem: str, root: Path, dialect: _Dialect) -> Row | Rejected:
    """Everything about one row but the decoding of its images."""
    value = record.value
    name = row_id(value, position)
    try:
        if record.problem is not None:
            raise record.problem
        parsed = parse_row(value)
        dialect.add(parsed, record.line)
        source = row_source(value, stem)
        return Row(
            row=position,
            uid=row_uid(source, position, value),
            source=source,
            messages=parsed.messages,
            images=tuple(resolve_image(image, root) for image in parsed.images),
            raw=record.raw,
            id=name,
            line=record.line,
        )
    except RowError as error:
        return Rejected(row=position, id=name, code=error.code, detail=error.detail, line=record.line)


def _with_images_checked(outcomes: list[Row | Rejected]) -> list[Row | Rejected]:
    """Quarantine the rows with an image that cannot be decoded. Each file is decoded once."""
    rows = (outcome for outcome in outcomes if isinstance(outcome, Row))
    keys = list(dict.fromkeys(_image_key(ref) for row in rows for ref in row.images))
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        verdicts = dict(zip(keys, track(pool.map(_image_problem, keys), len(keys), "images"), strict=True))

    def checked(outcome: Row | Rejected) -> Row | Rejected:
        if isinstance(outcome, Rejected):
            return outcome
        problems = (verdicts[_image_key(ref)] for ref in outcome.images)
        problem = next((problem for problem in problems if problem is not None), None)
        return outcome if problem is None else reject(outcome, problem)

    return [checked(outcome) for outcome in outcomes]


def _image_problem(ref: ImageRef) -> RejectedImage | None:
    try:
        verify_image(ref)
    except RejectedImage as problem:
        return problem
    return None


def _image_key(ref: ImageRef) -> ImageRef:
    """The same for all references to one file."""
    return ref if ref.path is None else ImageRef(ref.path, None, ref.path.name)


def _input_file(path: str | os.PathLike) -> Path:
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix in UNSUPPORTED and file.exists():
        raise ConfigError(f"{file}: {suffix} files cannot be read yet", FIX_FORMAT)
    if file.is_file():
        return file
    if file.exists():
        raise ConfigError(f"{file} is not a file, and folders cannot be read yet", FIX_FORMAT)
    if suffix or file.is_absolute():
        raise ConfigError(f"there is no file {file}", "check --data")
    raise ConfigError(f"there is no file {file}, and data sets of the Hub cannot be read yet", FIX_FORMAT)


def _image_folder(path: str | os.PathLike, image_root: str | os.PathLike | None) -> Path:
    root = Path(path).parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise ConfigError(f"the image root {root} is not a folder", "check --image-root")
    return root


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    """All or nothing: a temporary file beside the target takes its place when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(chunks)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and run again" if full else "check --output"
        raise DiskError(f"{path} cannot be written: {error.strerror}", fix) from error
    finally:
        temporary.unlink(missing_ok=True)
