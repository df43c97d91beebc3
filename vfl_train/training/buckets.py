"""Which vision function each training row trains, as `vfl-train select` found it.

`scores.parquet` speaks of the pool that was scored; what is trained is mostly `selected.*`, a part of that
pool in a file of its own, where rows have other numbers. Selected rows keep their order, so the k-th one is
the k-th score marked `selected`. That it really is the same row is proven, not assumed: either the file is
byte for byte the one that select's manifest lists, or the row has the uid of that score, a hash over
source, position in the pool and content.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vfl_train.data.containers import selected_file
from vfl_train.data.rows import Row, row_uid
from vfl_train.errors import ConfigError, DataError
from vfl_train.runs import MANIFEST, file_sha256

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig

SCORES = "scores.parquet"
_COLUMNS = ["uid", "row", "source", "bucket", "selected"]
_FIX = "give --scores the select output that this data came from, or score the data again"


@dataclass(frozen=True)
class Buckets:
    """`of`: bucket by row number of the training data; `sha256` of the scores, part of a run's inputs."""

    of: Mapping[int, str]
    sha256: str

    def rows_of(self, function: str, rows: Sequence[Row]) -> list[Row]:
        """The rows of a function's bucket, in order."""
        return [row for row in rows if self.of.get(row.row) == function]

    def counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Rows a bucket."""
        return dict(sorted(Counter(self.of[row.row] for row in rows if row.row in self.of).items()))


def find_buckets(config: LoraConfig, rows: Sequence[Row], sha256: str) -> Buckets | None:
    """The buckets of `rows`, which were read from a file of hash `sha256`: from --scores, else from the
    folder of --data if select wrote it, else None.

    Raises:
        ConfigError: --scores holds no scores.parquet, or one that cannot be read.
        DataError: the scores are not those of these rows (naming the first row that does not fit).
    """
    data = selected_file(Path(config.data)) or Path(config.data)
    folder = config.scores if config.scores is not None else data.parent
    path = Path(folder) / SCORES
    if not path.is_file():
        if config.scores is None:
            return None
        raise ConfigError(
            f"--scores {folder} holds no {SCORES}", "give the output folder of vfl-train select"
        )
    written = _written(Path(folder))
    if config.scores is None and data.name not in written:
        return None  # another file that happens to lie there
    scores = _read(path)
    return Buckets(_match(path, scores, rows, sha256 in written.values()), file_sha256(path))


def _written(folder: Path) -> dict[str, str]:
    """Name and sha256 of the file of selected rows that select wrote into `folder`; empty without one."""
    try:
        name = json.loads((folder / "selection.json").read_text(encoding="utf-8"))["selected"]
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        data = next((f for f in files if f.startswith(f"{name}/") and f.endswith(".arrow")), name)
        return {name: files[data]["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(path: Path) -> list[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise ConfigError(f"{path} cannot be read: {str(e).splitlines()[0]}", "run vfl-train select") from e
    return sorted(table, key=lambda score: score["row"])


def _match(path: Path, scores: Sequence[Mapping], rows: Sequence[Row], proven: bool) -> dict[int, str]:
    """Bucket by row number. The rows are the pool itself, or its selected ones in their order; `proven`: the
    file is the one that select wrote."""
    by_uid = {score["uid"]: score["bucket"] for score in scores}
    if rows and rows[0].uid in by_uid:
        return _match_pool(path, by_uid, rows)
    selected = [score for score in scores if score["selected"]]
    found = {}
    for row in rows:
        score = selected[row.row] if row.row < len(selected) else None
        if score is None:
            message = f"row {row.row} of the data is past the {len(selected)} rows that {path} selected"
            raise DataError(message, _FIX)
        if not proven and _uid_in_pool(row, score) != score["uid"]:
            message = f"row {row.row} of the data is not row {score['row']} of the pool that {path} scored"
            raise DataError(message, _FIX)
        found[row.row] = score["bucket"]
    return found


def _match_pool(path: Path, by_uid: Mapping[str, str], rows: Sequence[Row]) -> dict[int, str]:
    stranger = next((row for row in rows if row.uid not in by_uid), None)
    if stranger is not None:
        raise DataError(f"{path} has no score of row {stranger.row} of the data", _FIX)
    return {row.row: by_uid[row.uid] for row in rows}


def _uid_in_pool(row: Row, score: Mapping) -> str | None:
    """The uid of this row if it is the pool's row that `score` is of; None where it has no JSON text."""
    return row_uid(score["source"], score["row"], json.loads(row.raw)) if row.raw else None
