"""The tables for the kernels: whatever the block sizes, each query reads what the definition says, once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import Shape, random_case

from vfl_train.kernels.vision_kv.arguments import Rows, read_rows
from vfl_train.kernels.vision_kv.configs import FORWARD, forward_config, split_count
from vfl_train.kernels.vision_kv.plan import (
    forward_tables,
    make_runs,
    prefix_readers,
    stretches,
    suffix_readers,
)

BLOCKS = st.sampled_from([1, 3, 16, 64, 128])
NO_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]  # a case is a seed


def rows_of(seed: int) -> Rows:
    case = random_case(Shape(seed, images=4, rows=9, tokens=30, width=1, spans=seed % 4), device="cpu")
    names = ("row_image", "row_source", "spans", "row_start", "row_lengths", "prefix_lengths")
    return read_rows(case["q"], case["prefix_k"], *(case[name] for name in names))


def wanted(rows: Rows) -> dict[tuple[int, int], Counter]:
    """By (row, token): the prefix keys ("p", bank, position) and suffix keys ("s", row, token) it reads."""
    found = {}
    for row, image in enumerate(rows.image):
        for token in range(rows.lengths[row]):
            source = rows.source[row]
            if token < rows.start[row]:
                source = (image,) * len(source)
            inside = {at for a, b in rows.spans[image] for at in range(a, b)}
            keys = Counter(("p", image, at) for at in range(rows.ends[image]) if at not in inside)
            for k, bank in enumerate(source):
                if bank >= 0:
                    keys.update(("p", bank, at) for at in range(*rows.spans[bank][k]))
            keys.update(("s", row, at) for at in range(token + 1))
            found[row, token] = keys
    return found


@settings(max_examples=60, deadline=None, phases=NO_SHRINKING)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 2, 7]), block_m=BLOCKS, block_n=BLOCKS)
def test_every_query_reads_its_keys_once(seed, groups, block_m, block_n):
    rows = rows_of(seed)
    t = forward_tables(make_runs(rows), rows.lengths, rows.tokens, groups, block_m, block_n)
    found: dict[tuple[int, int], list[Counter]] = {}
    for m, m_end, chunk, chunks, key, loose, own, suffix in t.tiles.tolist():
        shared = Counter()
        before = 0
        for bank, start, count, blocks in t.chunks[chunk : chunk + chunks].tolist():
            assert blocks == before and count > 0
            before += count
            shared.update(("p", bank, at) for at in range(start, start + count * block_n))
        shared.update(("p", bank, at) for bank, at in t.keys[key : key + loose].tolist())
        for index in range(m, min(m + block_m, m_end)):
            row, token, begin, _ = t.queries[index // groups].tolist()
            assert own <= begin and begin + token < own + suffix
            mine = Counter(("s", r, at) for r, at in t.keys[begin : begin + token + 1].tolist())
            found.setdefault((row, token), []).append(shared + mine)
    assert {k: v[0] for k, v in found.items()} == wanted(rows)
    assert all(len(v) == groups for v in found.values())


@settings(max_examples=60, deadline=None, phases=NO_SHRINKING)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 2, 7]), block_n=BLOCKS)
def test_every_key_knows_its_readers(seed, groups, block_n):
    """The tables of the backward pass hold the same pairs, seen from the keys."""
    rows = rows_of(seed)
    runs = make_runs(rows)
    queries = forward_tables(runs, rows.lengths, rows.tokens, groups, 16, 16).queries
    numbers = rows.lengths, rows.tokens, groups, block_n
    found: dict[tuple[int, int], Counter] = {}
    for kind, (bounds, readers), length in (
        ("p", prefix_readers(runs, len(rows.spans), rows.prefix, groups, block_n), rows.prefix),
        ("s", suffix_readers(runs, *numbers), rows.tokens),
    ):
        per_bank = -(-length // block_n)
        assert len(bounds) == (len(rows.spans) if kind == "p" else len(rows.image)) * per_bank + 1
        for block, (first, last) in enumerate(pairwise(bounds)):
            bank, start = block // per_bank, block % per_bank * block_n
            for begin, end, low, high in readers[first:last].tolist():
                for row, token, *_ in queries[begin // groups : end // groups].tolist():
                    keys = range(max(low, start), min(high, start + block_n))
                    mine = [at for at in keys if kind == "p" or (bank == row and at <= token)]
                    found.setdefault((row, token), Counter()).update((kind, bank, at) for at in mine)
    assert found == wanted(rows)


def test_rows_that_read_the_same_are_one_run():
    """Sorted by what they read: tiles are full whatever the order of rows; the longest come first."""
    plain, dropped, swapped = (0,), (-1,), (1,)
    rows = Rows((0,) * 5, (plain, dropped, plain, swapped, plain), (((2, 9),), ((1, 8),)), (0,) * 5, (3,) * 5,
                (9, 9), 3, 9)  # fmt: skip
    runs = make_runs(rows)
    assert [[row for row, _, _ in run.parts] for run in runs] == [[0, 2, 4], [3], [1]]
    assert [run.stretches for run in runs] == [((0, 0, 9),), ((0, 0, 2), (1, 1, 8)), ((0, 0, 2),)]


def test_neighbouring_stretches_are_joined():
    rows = Rows((0,), ((0, 0),), (((1, 3), (3, 5)),), (0,), (1,), (7,), 1, 7)
    assert stretches(rows, 0, (0, 0)) == ((0, 0, 7),)
    assert stretches(rows, 0, (-1, 0)) == ((0, 0, 1), (0, 3, 7))


def test_a_swap_costs_no_more_blocks_than_none():
    """K8: the keys that stretches leave over at their ends share blocks."""
    text, image, block = 20, 600, 64
    spans = (((text, text + image),),) * 2
    for source in (0, 1):
        rows = Rows((0,), ((source,),), spans, (0,), (1,), (text + image,) * 2, 1, text + image)
        t = forward_tables(make_runs(rows), rows.lengths, 1, 7, 16, block)
        (tile,) = t.tiles.tolist()
        blocks = int(t.chunks[:, 2].sum()) + -(-(tile[5] + tile[7]) // block)
        assert blocks == -(-(text + image + 1) // block)


@pytest.mark.parametrize(
    ("programs", "blocks", "splits"),
    [(1000, 31, 1), (128, 31, 1), (8, 31, 16), (8, 0, 1), (8, 3, 1), (60, 31, 2)],
)
def test_splits_fill_the_device_and_no_more(programs, blocks, splits):
    assert split_count(programs, blocks, processors=132) == splits


def test_the_tile_follows_the_longest_run():
    import torch

    cuda = torch.device("cuda")
    small, middle, large = FORWARD[2, 128]
    for m, config in ((7, small), (17, middle), (65, large), (8000, large)):
        assert forward_config(torch.bfloat16, 80, m, cuda) == config
    assert np.all([c.block_m & (c.block_m - 1) == 0 for options in FORWARD.values() for c in options])
