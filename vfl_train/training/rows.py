"""What a run trains on: the rows of the data, less those held out, those too long and, per function, those of
other functions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vfl_train.data.overlong import Fitted, FittingCollator, Verdict, fitted, judge_rows
from vfl_train.data.readers import Dataset, read_dataset
from vfl_train.errors import ConfigError, DataError
from vfl_train.training.buckets import Buckets, find_buckets
from vfl_train.training.distributed import exchange, world

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig
    from vfl_train.data.collator import Collator, Encoder
    from vfl_train.data.rows import Rejected, Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSet:
    """Rows of one file with what belongs to them: function and pixel limit by row number."""

    rows: Sequence[Row]
    buckets: Mapping[int, str] = field(default_factory=dict)
    limits: Mapping[int, int] = field(default_factory=dict)

    def collator(self, encoder: Encoder) -> Collator:
        """Makes batches of them."""
        return FittingCollator(encoder, self.limits)


@dataclass(frozen=True)
class TrainingRows:
    """`train` and `validation` (None without), `rejected` rows of both, and `inputs`: name -> sha256 of what
    was read. `function` is the one whose bucket this is, None for all rows."""

    train: RowSet
    validation: RowSet | None
    rejected: list[Rejected]
    inputs: Mapping[str, str]
    function: str | None = None

    @property
    def rows(self) -> Sequence[Row]:
        """The training rows."""
        return self.train.rows

    @property
    def sha256(self) -> str:
        """Of the data file."""
        return self.inputs["data"]


def read_rows(config: LoraConfig, path: str | None = None) -> Dataset:
    """The rows of --data, or of `path`. Raises DataError if none can be used."""
    dataset = read_dataset(Path(path or config.data), image_root=config.image_root, limit=config.limit)
    if not dataset.rows:
        first = dataset.rejected[0] if dataset.rejected else None
        reason = f"row {first.row}: {first.detail}" if first else "it is empty"
        raise DataError(f"{dataset.path} has no usable row: {reason}", "run vfl-train data check")
    return dataset


def buckets_of(config: LoraConfig, dataset: Dataset) -> Buckets | None:
    """Which function each row trains, if select left word of it (see `buckets`). Raises ConfigError where
    --per-function needs it and there is none, DataError."""
    found = find_buckets(config, dataset.rows, dataset.sha256)
    if found is None and config.per_function:
        raise ConfigError(
            "--per-function needs to know which function each row trains",
            "give --scores the output of vfl-train select, or train on its selected rows",
        )
    return found


def prepare_rows(
    config: LoraConfig, dataset: Dataset, buckets: Buckets | None, function: str | None = None
) -> TrainingRows:
    """Split off the validation rows and drop those of other functions than `function`; nothing is measured
    yet (see `fit`).

    Raises:
        DataError: no row is left.
    """
    inputs = {"data": dataset.sha256}
    rows, of = dataset.rows, buckets.of if buckets is not None else {}
    rejected = list(dataset.rejected)
    if buckets is not None:
        inputs["scores"] = buckets.sha256
    if function is not None and buckets is not None:
        rows = buckets.rows_of(function, rows)
    validation = None
    if rows and config.eval_data is None and config.eval_share > 0:
        from vfl_train.training.validation import split_rows

        rows, held = split_rows(rows, config.eval_share, config.seed)
        validation = RowSet(held, of)
    elif config.eval_data is not None:
        other = read_rows(config, config.eval_data)
        inputs["eval_data"] = other.sha256
        validation = RowSet(other.rows)
        for entry in other.rejected:
            log.warning("%s: row %d is left out: %s", other.path, entry.row, entry.detail)
    if not rows:
        counts = buckets.counts(dataset.rows) if buckets is not None else {}
        raise DataError(
            f"no row of {config.data} trains {function}; buckets: {json.dumps(counts)}",
            f"leave {function} out of --functions, or select more rows",
        )
    return TrainingRows(RowSet(rows, of), validation, rejected, inputs, function)


def fit(config: LoraConfig, prepared: TrainingRows, encoder: Encoder) -> TrainingRows:
    """Apply --max-length with --overlong. Raises ConfigError, DataError (see `data.overlong`)."""
    if config.max_length is None:
        return prepared
    train = _fitted(config, prepared.train.rows, encoder)
    validation, rejected = prepared.validation, [*prepared.rejected, *train.rejected]
    if validation is not None:
        found = _fitted(config, validation.rows, encoder)
        validation = replace(validation, rows=found.rows, limits=found.limits)
        if "eval_data" not in prepared.inputs:
            rejected += found.rejected
    log.info(
        "--max-length %d: %d rows are too long, %d have their images shrunk",
        config.max_length, len(rejected) - len(prepared.rejected), len(train.limits),
    )  # fmt: skip
    fitting = replace(prepared.train, rows=train.rows, limits=train.limits)
    return replace(prepared, train=fitting, validation=validation, rejected=rejected)


def _fitted(config: LoraConfig, rows: Sequence[Row], encoder: Encoder) -> Fitted:
    """Each process measures its share of the rows."""
    assert config.max_length is not None
    here = world()
    mine = judge_rows(rows[here.rank :: here.size], encoder, config.max_length, config.overlong)
    verdicts: list[Verdict] = [None] * len(rows)
    for rank, found in enumerate(exchange(mine, "the row lengths", patience=float("inf"))):
        verdicts[rank :: here.size] = [tuple(v) if isinstance(v, list) else v for v in found]
    return fitted(rows, verdicts, config.max_length)
