"""Scores of a pool, block by block: a shard is a fixed block of rows, scored by itself and written at once.

What a shard holds follows from its rows and from what scores them, so scores are the same for any number of
processes, and a run that was killed goes on with the shards it has. A shard says what it was computed from
(its `key`): of other weights, another processor, ablation, code, or of rows or image files that changed
since, it is not used again. Batch size is no part of the key: it moves scores by rounding only, and a run
that was short of memory has to go on with a smaller one.

Not in memory: the pool. A process holds one block of rows and, at the end, the columns of numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vfl_train.data.output import replacing
from vfl_train.data.rows import Reason, Rejected, Row
from vfl_train.data_select.duplicates import HASH_BYTES
from vfl_train.data_select.scoring import Scores
from vfl_train.errors import DataError
from vfl_train.interventions.readout import Cost
from vfl_train.progress import track
from vfl_train.schemas import BY_LAYER, score_columns

if TYPE_CHECKING:
    from vfl_train.data.pool import Pool

SHARD_ROWS = 1024
_KEY = b"vfl_shard"
_CHOSEN = ("bucket", "score", "selected")  # columns of scores.parquet that ranking adds
log = logging.getLogger(__name__)


class AnyScorer(Protocol):
    """What `Scorer` is to this module."""

    by_layer: bool
    rejected: list[Rejected]
    cost: Cost

    def score(self, rows: Sequence[Row]) -> list[Scores]: ...


@dataclass
class Scored:
    """The scores of a pool. `table`: a row each, in input order, with the columns of scores.parquet that
    are measured (text_key and image_hash beside them unless it was read from a finished run); `rejected`:
    the rows without scores, in input order; `forwards`, `reference`: rows of the sweeps, and why some ran on
    the reference path."""

    table: pa.Table
    rejected: list[Rejected]
    forwards: int = 0
    reference: Counter[str] = field(default_factory=Counter)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [n]."""
        return self.table[name].to_numpy()


def blocks(rows: int) -> list[tuple[int, int]]:
    """[start, stop) of every shard of a pool of `rows` rows."""
    return [(start, min(start + SHARD_ROWS, rows)) for start in range(0, rows, SHARD_ROWS)]


def score_shards(
    pool: Pool, rows: int, scorer: AnyScorer, functions: Sequence[str], folder: Path, base: str,
    rank: int = 0, size: int = 1,
) -> None:  # fmt: skip
    """Write the shards of the first `rows` rows that fall to process `rank` of `size` and are not there yet.

    Args:
        base: what the scores depend on beside the rows.

    Raises:
        DataError: a damaged data file.
        NumericError: naming the row whose loss is not finite.
        DiskError: a shard cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = [(k, block) for k, block in enumerate(blocks(rows)) if k % size == rank]
    reused = 0
    for number, (start, stop) in track(mine, label="blocks of 1024 rows"):
        path, outcomes = folder / f"{number:06d}.parquet", list(pool.iterate(start, stop))
        key = shard_key(base, outcomes)
        if read_shard(path, key) is not None:
            reused += 1
            continue
        _score(outcomes, scorer, functions, path, key)
    if reused:
        log.info("%d of %d blocks were scored before", reused, len(mine))


def score_probes(
    rows: Sequence[Row], scorer: AnyScorer, functions: Sequence[str], path: Path, base: str
) -> None:
    """Write the scores of probe rows to `path`, if they are not there yet. Errors as `score_shards`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = shard_key(base, rows)
    if read_shard(path, key) is None:
        _score(rows, scorer, functions, path, key)


def _score(
    outcomes: Sequence[Row | Rejected], scorer: AnyScorer, functions: Sequence[str], path: Path, key: str
) -> None:
    scorer.rejected, scorer.cost = [], Cost()
    scored = scorer.score([outcome for outcome in outcomes if isinstance(outcome, Row)])
    rejected = [*(o for o in outcomes if isinstance(o, Rejected)), *scorer.rejected]
    write_shard(path, _as_table(scored, rejected, functions, scorer.by_layer), key, scorer.cost)


def read_probes(path: Path) -> pa.Table:
    """The scores of probe rows. Raises DataError."""
    found = _open(path)
    if found is None:
        raise DataError(f"{path} is missing or damaged", "run the command again")
    return found[0].filter(pc.is_null(found[0]["code"]))


def read_shards(folder: Path, rows: int, functions: Sequence[str], by_layer: bool = False) -> Scored:
    """The scores of all shards. Raises DataError if one is missing or damaged."""
    measured = [c for c in score_columns(tuple(functions), by_layer) if c not in _CHOSEN]
    tables, rejected, forwards, reasons = [], [], 0, Counter[str]()
    for number in range(len(blocks(rows))):
        found = _open(folder / f"{number:06d}.parquet")
        if found is None:
            raise DataError(f"block {number} of the scores in {folder} is missing", "run the command again")
        table, said = found
        refused = pc.is_valid(table["code"])
        rejected += [
            Rejected(r["row"], r["id"], Reason(r["code"]), r["detail"], r["line"])
            for r in table.filter(refused).select(["row", "id", "code", "detail", "line"]).to_pylist()
        ]
        # A copy: a part of the table as it was read would keep all of its pages.
        tables.append(table.filter(pc.invert(refused)).select([*measured, "text_key", "image_hash"]))
        forwards += said["forwards"]
        reasons.update(said["reference"])
    return Scored(pa.concat_tables(tables).combine_chunks(), rejected, forwards, reasons)


# --- one shard -----------------------------------------------------------------------------------


def shard_key(base: str, outcomes: Sequence[Row | Rejected]) -> str:
    """What tells a shard's scores from those of other rows, or of the same with other image files."""
    digest = hashlib.sha256(base.encode("ascii"))
    for outcome in outcomes:
        for part in _identity(outcome):
            digest.update(f"{part}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _identity(outcome: Row | Rejected) -> Iterator[object]:
    if isinstance(outcome, Rejected):
        yield from (outcome.row, outcome.code, outcome.detail)
        return
    yield outcome.uid
    for ref in outcome.pictures:
        yield ref.label
        if ref.path is not None:  # bytes inside the data file are in its hash
            try:
                found = ref.path.stat()
            except OSError:
                continue
            yield from (found.st_size, found.st_mtime_ns)


def write_shard(path: Path, table: pa.Table, key: str, cost: Cost) -> None:
    """Raises DiskError."""
    # Sorted: which row met a reason first must not show in the bytes.
    said = {"key": key, "forwards": cost.rows, "reference": dict(sorted(cost.reasons.items()))}
    table = table.replace_schema_metadata({_KEY: json.dumps(said)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_shard(path: Path, key: str) -> pa.Table | None:
    """The shard if it is whole and was computed from what `key` stands for."""
    if not path.exists():
        return None
    found = _open(path)
    if found is None:
        log.warning("%s is damaged: its rows are scored again", path)
        return None
    if found[1]["key"] != key:
        log.info("%s is of other rows or settings: its rows are scored again", path)
        return None
    return found[0]


def _open(path: Path) -> tuple[pa.Table, dict[str, Any]] | None:
    try:
        # Not read_table, which takes twice the time and memory for a file of this size.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        said = json.loads((table.schema.metadata or {})[_KEY])
        whole = isinstance(said["key"], str) and isinstance(said["forwards"], int)
        return (table, said) if whole and isinstance(said["reference"], dict) else None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def _as_table(
    scored: Sequence[Scores], rejected: Sequence[Rejected], functions: Sequence[str], by_layer: bool
) -> pa.Table:
    """The rows of a block in input order; what a scored or a rejected row does not have is null."""
    fields: list[tuple[str, pa.DataType]] = [
        ("row", pa.int64()), ("uid", pa.string()), ("source", pa.string()), ("n_answer_tokens", pa.int32()),
        ("loss_full", pa.float64()), ("visual_gain", pa.float64()),
        *((f"{kind}_{f}", pa.float64()) for kind in ("loss", "delta") for f in functions),
        ("flags", pa.list_(pa.string())), ("text_key", pa.int64()), ("image_hash", pa.binary(HASH_BYTES)),
        ("id", pa.string()), ("line", pa.int64()), ("code", pa.string()), ("detail", pa.string()),
    ]  # fmt: skip
    if by_layer:
        fields.append((BY_LAYER, pa.list_(pa.float64())))
    entries = sorted(chain(map(_entry, scored), map(_refusal, rejected)), key=lambda entry: entry["row"])
    return pa.Table.from_pylist(entries, pa.schema(fields))


def _entry(s: Scores) -> dict[str, Any]:
    return {
        "row": s.row.row, "uid": s.row.uid, "source": s.row.source, "n_answer_tokens": s.n_answer_tokens,
        "loss_full": s.loss_full, "visual_gain": s.visual_gain, "flags": list(s.flags),
        "text_key": s.text_key, "image_hash": s.image_hash or bytes(HASH_BYTES),
        **{f"loss_{f}": value for f, value in s.losses.items()},
        **{f"delta_{f}": value for f, value in s.deltas.items()}, BY_LAYER: list(s.by_layer),
    }  # fmt: skip


def _refusal(r: Rejected) -> dict[str, Any]:
    return {"row": r.row, "id": r.id, "line": r.line, "code": str(r.code), "detail": r.detail}


# --- what scores depend on -----------------------------------------------------------------------


def base_key(facts: Mapping[str, Any]) -> str:
    """What all shards of a run depend on, in one hash."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode("ascii")).hexdigest()


def code_digest() -> str:
    """sha256 of the source that decides scores."""
    from vfl_train import data, interventions, models
    from vfl_train.data_select import scoring

    folders = [Path(str(module.__file__)).parent for module in (interventions, models)]
    files = [f for folder in folders for f in folder.rglob("*.py")]
    names = ("answers.py", "collator.py", "images.py", "parse.py", "placeholders.py")
    files += [Path(str(data.__file__)).parent / name for name in names] + [Path(str(scoring.__file__))]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: (f.parent.name, f.name)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def processor_digest(processor: Any) -> str:
    """sha256 of what turns messages and images into model inputs."""
    tokenizer = processor.tokenizer
    image = getattr(processor, "image_processor", None)
    parts = [
        str(getattr(processor, "chat_template", "")),
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer),
        json.dumps(image.to_dict(), sort_keys=True, default=str) if image is not None else "",
    ]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
