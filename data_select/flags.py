"""Flags of rows as one Arrow list column, and how flags are added to many rows at once.

text_only            the row has no image
suspicious_label     see `choose.suspicious`; ranked last
near_duplicate:ROW   says the same about the same picture as row ROW, which stays; never picked
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SUSPICIOUS = "suspicious_label"
NEAR_DUPLICATE = "near_duplicate"


def flagged(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Which rows [n] carry the flag `name` (what follows a colon does not count)."""
    values, parents = _flat(column)
    mine = pc.or_(pc.equal(values, name), pc.starts_with(values, f"{name}:"))
    out = np.zeros(len(column), dtype=bool)
    out[parents[np.asarray(mine, dtype=bool)]] = True
    return out


def replaced(
    column: pa.ChunkedArray, name: str, rows: np.ndarray, detail: np.ndarray | None = None
) -> pa.Array:
    """The column with the flag `name` on exactly these rows (ascending positions); `detail`: what follows
    its colon, a number each."""
    values, parents = _flat(column)
    others = ~np.asarray(pc.or_(pc.equal(values, name), pc.starts_with(values, f"{name}:")), dtype=bool)
    if detail is None:
        added = pa.array([name], pa.string()).take(pa.array(np.zeros(len(rows), dtype=np.int64)))
    else:
        added = pc.binary_join_element_wise(name, pa.array(detail).cast(pa.string()), ":")
    every = pa.concat_arrays([values.filter(pa.array(others)), added])
    owner = np.concatenate([parents[others], rows])
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(column)))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), every.take(pa.array(order)))


def counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Rows of each flag, by name without what follows a colon."""
    values, _ = _flat(column)
    names = pc.replace_substring_regex(values, ":.*", "")
    return {entry["values"]: entry["counts"] for entry in sorted(names.value_counts().to_pylist(), key=str)}


def _flat(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """(all flags, the row of each)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of a table without rows
        array = pa.array([], column.type)
    return array.flatten().cast(pa.string()), array.value_parent_indices().to_numpy().astype(np.int64)
