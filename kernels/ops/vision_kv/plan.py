"""Which keys which queries read, as small integer tables for the kernels. Host code, no tensors of values.

Queries whose rows read the same stretches of the same prefixes form a *run*. A run's queries, times the query
heads of a key head, are one dimension M = (row, token, group), cut into tiles; rows are not seen as such, so
tiles are full but for a run's last. The keys of a tile are

    full blocks    of BLOCK_N prefix keys, in chunks that follow one another: loaded without a mask
    loose keys     what the stretches leave over at their ends, key by key, and
    suffix keys    of the rows in the tile, causal; both in one loop, so that a run costs
                   ceil(keys / BLOCK_N) blocks however many stretches it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vfl_train.kernels.vision_kv.arguments import Rows

Stretch = tuple[int, int, int]  # bank (whose prefix), start, stop


class Run(NamedTuple):
    """`parts` [(row, first token, token after the last)] that read `stretches`."""

    stretches: tuple[Stretch, ...]
    parts: list[tuple[int, int, int]]

    def queries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Part, row and token of each query, in the run's order."""
        row, first, stop = np.array(self.parts).T
        count = stop - first
        part = np.repeat(np.arange(len(count)), count)
        before = np.cumsum(count) - count
        return part, row[part], np.arange(len(part)) - before[part] + first[part]

    @property
    def size(self) -> int:
        """Queries of one head."""
        return sum(stop - first for _, first, stop in self.parts)


class Forward(NamedTuple):
    """Tables of the passes that walk over queries; int32.

    tiles [T, 8]: first M, M after the run's last; first chunk, their number; first loose key, their number;
    first suffix key, their number: those of the tile's rows, up to its last query.
    """

    tiles: np.ndarray
    queries: np.ndarray  # [Q, 4] row, token, first suffix key of its row, 0
    chunks: np.ndarray  # [., 4] bank, first position, blocks, blocks of the run's chunks before it
    keys: np.ndarray  # [., 2] loose keys: bank, position; suffix keys: row, token (-1 beyond its length)


class Backward(NamedTuple):
    """Tables of the pass that walks over keys; int32. `bounds` [banks * blocks + 1] cuts `readers` [., 4],
    one (first M, M after the last, first position, position after the last) for each stretch of queries
    that reads the block."""

    bounds: np.ndarray
    readers: np.ndarray


def make_runs(rows: Rows) -> list[Run]:
    """The runs, those with most keys first: the device ends with the short ones."""
    runs: dict[tuple[Stretch, ...], Run] = {}
    known: dict[tuple, tuple[Stretch, ...]] = {}

    def seen(row: int, source: tuple[int, ...]) -> tuple[Stretch, ...]:
        key = rows.image[row], source
        if key not in known:
            known[key] = stretches(rows, *key)
        return known[key]

    def add(what: tuple[Stretch, ...], row: int, first: int, stop: int) -> None:
        if first < stop:
            runs.setdefault(what, Run(what, [])).parts.append((row, first, stop))

    for row, image in enumerate(rows.image):
        stop = rows.lengths[row]
        start = min(rows.start[row], stop)
        bound = seen(row, rows.source[row])
        plain = seen(row, (image,) * len(rows.source[row])) if start else bound
        if plain == bound:  # as one part, whose suffix keys stand in the tables once
            add(bound, row, 0, stop)
        else:
            add(plain, row, 0, start)
            add(bound, row, start, stop)
    return sorted(runs.values(), key=lambda run: -sum(stop - start for _, start, stop in run.stretches))


def stretches(rows: Rows, image: int, source: tuple[int, ...]) -> tuple[Stretch, ...]:
    """What a query of `image` with `source` sees of all prefixes, in order; neighbours joined."""
    out: list[Stretch] = []

    def add(bank: int, start: int, stop: int) -> None:
        if out and out[-1][0] == bank and out[-1][2] == start:
            start = out.pop()[1]
        if start < stop:
            out.append((bank, start, stop))

    spans, at = rows.spans[image], 0
    for k in sorted((k for k, (a, b) in enumerate(spans) if a < b), key=lambda k: spans[k]):
        add(image, at, spans[k][0])
        if source[k] >= 0:
            add(source[k], *rows.spans[source[k]][k])
        at = spans[k][1]
    add(image, at, rows.ends[image])
    return tuple(out)


def forward_tables(
    runs: Sequence[Run], lengths: Sequence[int], tokens: int, groups: int, block_m: int, block_n: int
) -> Forward:
    """`tokens`: S, `groups`: query heads of a key head."""
    tiles, queries, chunks, keys = [], [], [], []
    query, chunk, key = 0, 0, 0  # what stands in the tables before the run
    for run in runs:
        part, row, token = run.queries()
        run_chunks, loose = _cut(run.stretches, block_n)
        own = key + len(loose)
        m = np.arange(0, run.size * groups, block_m)
        first, last = m // groups, (np.minimum(m + block_m, run.size * groups) - 1) // groups
        columns = [
            query * groups + m, (query + run.size) * groups, chunk, len(run_chunks), key, len(loose),
            own + part[first] * tokens, (part[last] - part[first]) * tokens + token[last] + 1,
        ]  # fmt: skip
        tiles.append(np.stack([np.broadcast_to(c, m.shape) for c in columns], axis=1))
        queries.append(np.stack([row, token, own + part * tokens, np.zeros_like(row)], axis=1))
        chunks.append(run_chunks)
        keys += [loose, _suffix_keys([r for r, _, _ in run.parts], lengths, tokens)]
        query, chunk, key = query + run.size, chunk + len(run_chunks), own + len(run.parts) * tokens
    return Forward(_table(tiles, 8), _table(queries, 4), _table(chunks, 4), _table(keys, 2))


def _suffix_keys(rows: Sequence[int], lengths: Sequence[int], tokens: int) -> np.ndarray:
    """[rows * tokens, 2]: (row, token), token -1 beyond the row's length."""
    row, token = np.repeat(np.array(rows), tokens), np.tile(np.arange(tokens), len(rows))
    return np.stack([row, np.where(token < np.array(lengths)[row], token, -1)], axis=1)


def _cut(parts: Sequence[Stretch], block_n: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunks [., 4] of full blocks in `parts`, and the keys left over [., 2]."""
    chunks, keys, before = [], [], 0
    for bank, start, stop in parts:
        count = (stop - start) // block_n
        if count:
            chunks.append((bank, start, count, before))
        before += count
        keys += [(bank, at) for at in range(start + count * block_n, stop)]
    return _table([chunks], 4), _table([keys], 2)


def prefix_readers(runs: Sequence[Run], banks: int, prefix: int, groups: int, block_n: int) -> Backward:
    """Who reads each block of `block_n` positions of each prefix."""
    per_bank = -(-prefix // block_n)
    readers: list[list[tuple[int, int, int, int]]] = [[] for _ in range(banks * per_bank)]
    at = 0
    for run in runs:
        for bank, start, stop in run.stretches:
            for block in range(start // block_n, -(-stop // block_n)):
                readers[bank * per_bank + block].append((at * groups, (at + run.size) * groups, start, stop))
        at += run.size
    return _ragged(readers)


def suffix_readers(
    runs: Sequence[Run], lengths: Sequence[int], tokens: int, groups: int, block_n: int
) -> Backward:
    """Who reads each block of `block_n` suffix keys of each row: the row's own queries from there on."""
    per_row = -(-tokens // block_n)
    readers: list[list[tuple[int, int, int, int]]] = [[] for _ in range(len(lengths) * per_row)]
    at = 0
    for run in runs:
        for row, first, stop in run.parts:
            for block in range(-(-min(stop, lengths[row]) // block_n)):
                begin = at + max(0, block * block_n - first)
                readers[row * per_row + block].append(
                    (begin * groups, (at + stop - first) * groups, 0, lengths[row])
                )
            at += stop - first
    return _ragged(readers)


def _ragged(lists: Sequence[Sequence[tuple[int, ...]]]) -> Backward:
    bounds = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    return Backward(bounds, _table([each for each in lists if each], 4))


def _table(parts: Sequence, columns: int) -> np.ndarray:
    """All rows of `parts` in one int32 array [., columns]."""
    arrays = [np.asarray(p, dtype=np.int32).reshape(-1, columns) for p in parts]
    return np.concatenate(arrays) if arrays else np.zeros((0, columns), np.int32)
