"""From a pool's scores to its selection: buckets, flags, the pick, and what the baselines would pick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vfl_train.data_select import choose, flags
from vfl_train.data_select.duplicates import HASH_BYTES, first_alike
from vfl_train.data_select.shards import Scored
from vfl_train.data_select.signature import Likeness
from vfl_train.options import budget_rows, parse_weights
from vfl_train.schemas import BY_LAYER, score_columns

if TYPE_CHECKING:
    from vfl_train.config import SelectConfig

METHODS = ("vfl", "random", "loss", "visual-gain")


@dataclass(frozen=True)
class Selection:
    """The selection of a pool of n rows. `table`: scores.parquet; `chosen`: positions in it, ascending;
    `overlap`: Jaccard overlap with each other method's pick."""

    table: pa.Table
    chosen: np.ndarray
    budget: int
    overlap: dict[str, float]

    def column(self, name: str) -> np.ndarray:
        """A column, [n]; text as Python strings."""
        return self.table[name].to_numpy()


def with_duplicates(scored: Scored) -> Scored:
    """`scored` with every near-duplicate of an earlier row flagged."""
    array = pa.concat_arrays([*scored.table["image_hash"].chunks, pa.array([], pa.binary(HASH_BYTES))])
    hashes = np.frombuffer(array.buffers()[1], np.uint8, len(array) * HASH_BYTES).reshape(-1, HASH_BYTES)
    first = first_alike(scored.column("text_key"), hashes)
    later = np.flatnonzero(first != np.arange(len(first)))
    rows = scored.column("row")
    column = flags.replaced(scored.table["flags"], flags.NEAR_DUPLICATE, later, rows[first[later]])
    table = scored.table.drop_columns(["text_key", "image_hash"])
    return replace(scored, table=table.set_column(table.schema.get_field_index("flags"), "flags", column))


def rank(
    config: SelectConfig,
    scored: Scored,
    wanted: Sequence[str],
    functions: Sequence[str],
    probes: pa.Table | None = None,
) -> Selection:
    """The selection by `config`. Every method honours the budget, the cap per source and near-duplicates;
    buckets, mix and doubts about labels are `vfl`'s alone. With the scores of `probes`, rows are sorted by
    likeness to them (see `signature`). Raises ConfigError for a malformed option, DataError for too few
    probes."""
    full, gain = scored.column("loss_full"), scored.column("visual_gain")
    need, deltas = _needs(scored.table, functions)
    if probes is None:
        bucket = choose.buckets(need, deltas)
    else:
        known = _needs(probes, functions)[0]
        like = Likeness(probes["source"].to_numpy(), probes["loss_full"].to_numpy(), _by_layer(probes), known)
        bucket = like.buckets(full, _by_layer(scored.table), need, deltas)
    doubted = choose.suspicious(bucket, full, gain)
    budget = min(budget_rows(config.budget, len(bucket)), len(bucket))
    copies = flags.flagged(scored.table["flags"], flags.NEAR_DUPLICATE)
    source = _numbers(scored.table["source"])
    cap = None if config.cap_per_source is None else budget_rows(config.cap_per_source, budget)
    mix = parse_weights(config.mix, "--mix") if config.mix else None
    everyone = np.full(len(bucket), "all")
    ranked = {m: choose.scores(m, bucket, need, full, gain, config.seed) for m in METHODS}
    picks = {
        m: choose.pick(budget, everyone, ranked[m], ["all"], never=copies, source=source, cap=cap)
        for m in METHODS
        if m != "vfl"
    }
    picks["vfl"] = choose.pick(
        budget, bucket, ranked["vfl"], wanted, mix, config.fill, doubted, copies, source, cap
    )
    chosen = picks[config.method]
    selected = np.zeros(len(bucket), dtype=bool)
    selected[chosen] = True
    columns = {name: scored.table[name] for name in scored.table.column_names} | {
        "bucket": pa.array(bucket), "score": pa.array(ranked[config.method]), "selected": pa.array(selected),
        "flags": flags.replaced(scored.table["flags"], flags.SUSPICIOUS, np.flatnonzero(doubted)),
    }  # fmt: skip
    names = score_columns(tuple(functions), BY_LAYER in scored.table.column_names)
    table = pa.table({name: columns[name] for name in names})
    overlap = {m: choose.overlap(chosen, picks[m]) for m in METHODS if m != config.method}
    return Selection(table, chosen, budget, overlap)


def _needs(table: pa.Table, functions: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """How far each function's layers move the odds of each row's answer, and its loss; [n] each."""
    deltas = {f: table[f"delta_{f}"].to_numpy() for f in functions}
    return choose.needs({f: table[f"loss_{f}"].to_numpy() for f in functions}, deltas), deltas


def _by_layer(table: pa.Table) -> np.ndarray:
    """The losses without each single layer, [n, L]."""
    flat = pc.list_flatten(table[BY_LAYER]).to_numpy()
    return flat.reshape(len(table), -1) if len(table) else flat.reshape(0, 1)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each text, [n]."""
    return pc.dictionary_encode(column).combine_chunks().indices.to_numpy()
