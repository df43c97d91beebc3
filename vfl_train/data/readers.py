"""Read a data set whole, and write parts of it back in its own format.

Every row that is read ends up in exactly one of two lists, kept or quarantined; a `Dataset` where that is
not so cannot be made. Kept rows are read from the file again when they are asked for (`pool.py`), so that
a large set fits into memory.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from vfl_train.data.output import write_file
from vfl_train.data.pool import Pool, open_pool
from vfl_train.data.rows import Rejected, Row
from vfl_train.errors import DataError

log = logging.getLogger(__name__)


class PoolRows(Sequence[Row]):
    """The usable rows of a pool by position, read when asked for; in memory are their numbers only."""

    def __init__(self, pool: Pool, numbers: Sequence[int]) -> None:
        self.pool, self.numbers = pool, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> PoolRows: ...

    def __getitem__(self, index: int | slice) -> Row | PoolRows:
        """One row, or a part of them. Raises DataError for a row that has become unusable since."""
        if isinstance(index, slice):
            return PoolRows(self.pool, self.numbers[index])
        return _usable(self.pool, self.pool.row(self.numbers[index]))

    def __iter__(self) -> Iterator[Row]:
        ascending = all(a < b for a, b in zip(self.numbers, self.numbers[1:], strict=False))
        if not ascending or not len(self.numbers):
            yield from (self[index] for index in range(len(self)))
            return
        wanted = iter(self.numbers)
        due: int | None = next(wanted)
        for entry in self.pool.iterate(self.numbers[0], self.numbers[-1] + 1):
            if entry.row == due:
                yield _usable(self.pool, entry)
                due = next(wanted, None)


@dataclass(frozen=True)
class Dataset:
    """A data set, read. `rows` and `rejected` are in input order and share no row; `format` is the dialect
    and the container, such as "llava-jsonl"; `sha256` is of the whole file, or of all of several."""

    path: Path
    format: str
    rows: Sequence[Row] = field(repr=False)
    rejected: list[Rejected] = field(repr=False)
    sha256: str
    n_read: int
    image_root: Path
    pool: Pool = field(repr=False)

    def __post_init__(self) -> None:
        kept = self.rows.numbers if isinstance(self.rows, PoolRows) else [row.row for row in self.rows]
        positions = {*kept, *(entry.row for entry in self.rejected)}
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
    """Read a data set. Its format is detected from its content, and logged.

    Args:
        path: what `pool.open_pool` takes: a file, a folder, a pattern or a data set of the Hub.
        image_root: folder under which image paths lie; None is the data's own folder.
        check_images: decode every image once, in threads, so that none fails in the middle of a training;
            without it, images are only looked up.
        limit: read only the first so many rows.

    Raises:
        ConfigError: no such file or folder, or a format that cannot be read.
        DataError: an empty or damaged file, rows of no known format or of two.
    """
    pool = open_pool(path, image_root)
    kept, rejected = array("q"), []
    for entry in pool.iterate(0, limit, check_images):
        if isinstance(entry, Row):
            kept.append(entry.row)
        else:
            rejected.append(entry)
    dataset = Dataset(
        path=pool.path,
        format=pool.format,
        rows=PoolRows(pool, kept),
        rejected=rejected,
        sha256=pool.sha256,
        n_read=len(kept) + len(rejected),
        image_root=pool.image_root,
        pool=pool,
    )
    log.info("%s: %s", pool.path, dataset.summary())
    return dataset


def write_selected(dataset: Dataset, rows: Iterable[Row], path: str | os.PathLike) -> None:
    """Write `rows` in the dataset's own format, in input order, each as it was read (`Pool.write`).

    Raises:
        DiskError: the file cannot be written.
    """
    dataset.pool.write((row.row for row in rows), path)


def write_quarantine(rejected: Iterable[Rejected], path: str | os.PathLike) -> None:
    """Write quarantine.jsonl: one object a line with row, line, id, code and detail, in input order.

    Raises:
        DiskError: the file cannot be written.
    """
    ordered = sorted(rejected, key=lambda entry: entry.row)
    write_file(Path(path), (json.dumps(entry.as_dict()).encode("ascii") + b"\n" for entry in ordered))


def _usable(pool: Pool, entry: Row | Rejected) -> Row:
    if isinstance(entry, Rejected):
        where = f"row {entry.row}" + (f" (line {entry.line})" if entry.line else "")
        message = f"{where} of {pool.path} has become unusable: {entry.detail} [{entry.code}]"
        raise DataError(message, "do not change data that is in use; start again")
    return entry
