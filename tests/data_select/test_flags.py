"""Flags as a list column."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from vfl_train.data_select import flags


def column(*rows: list[str]) -> pa.ChunkedArray:
    middle = len(rows) // 2
    kind = pa.list_(pa.string())
    return pa.chunked_array([pa.array(rows[:middle], kind), pa.array(rows[middle:], kind)], kind)


def test_flags_are_found_with_and_without_what_follows_their_colon():
    found = column(["a"], [], ["b:12", "a"], ["ab"], ["b"])
    assert flags.flagged(found, "a").tolist() == [True, False, True, False, False]
    assert flags.flagged(found, "b").tolist() == [False, False, True, False, True]
    assert flags.counts(found) == {"a": 2, "ab": 1, "b": 2}


def test_a_flag_is_put_on_exactly_the_rows_given():
    found = flags.replaced(column(["a"], [], ["b:12", "a"], ["x"]), "b", np.array([0, 3]), np.array([7, 9]))
    assert found.to_pylist() == [["a", "b:7"], [], ["a"], ["x", "b:9"]]
    assert flags.replaced(pa.chunked_array([found]), "b", np.array([], dtype=int)).to_pylist() == [
        ["a"], [], ["a"], ["x"],
    ]  # fmt: skip
    assert flags.replaced(column([], []), "a", np.array([1])).to_pylist() == [[], ["a"]]


def test_no_rows():
    empty = pa.chunked_array([], pa.list_(pa.string()))
    assert flags.flagged(empty, "a").tolist() == [] and flags.counts(empty) == {}
    assert len(flags.replaced(empty, "a", np.array([], dtype=int))) == 0
