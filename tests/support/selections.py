"""A select output folder made by hand: which rows of a pool were taken, and what each trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vfl_train.data.readers import read_dataset
from vfl_train.runs import file_sha256


def write_selection(folder: Path, pool: Path, buckets: Sequence[str], chosen: Sequence[int]) -> Path:
    """scores.parquet, selection.json, manifest.json and selected.jsonl, of the JSONL file `pool` whose rows
    lie in `buckets`; returns the selected file. Image paths stay relative to the pool's folder."""
    folder.mkdir(parents=True)
    rows = read_dataset(pool).rows
    lines = pool.read_bytes().splitlines(keepends=True)
    selected = folder / "selected.jsonl"
    selected.write_bytes(b"".join(lines[i] for i in sorted(chosen)))
    table = {
        "uid": [row.uid for row in rows],
        "row": pa.array([row.row for row in rows], pa.int64()),
        "source": [row.source for row in rows],
        "bucket": list(buckets),
        "selected": [row.row in set(chosen) for row in rows],
    }
    pq.write_table(pa.table(table), folder / "scores.parquet")
    (folder / "selection.json").write_text(json.dumps({"selected": selected.name}), encoding="utf-8")
    files = {selected.name: {"sha256": file_sha256(selected)}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    return selected
