"""Rates, intervals, peaks and blocks on plain numbers."""

from __future__ import annotations

import pytest

from vfl_train.profiling.statistics import clustered_interval, flip_block, papers_block, peak
from vfl_train.schemas import wilson

ZERO = [0.0] * 12


def test_wilson_known_values():
    assert wilson(0, 0) == [0.0, 1.0]
    assert wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    low, high = wilson(20, 20)
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_clustered_intervals_are_wider_when_pairs_agree():
    agree = [(True, True)] * 10 + [(False, False)] * 10
    differ = [(True, False)] * 20
    (a, b), (c, d) = clustered_interval(agree), clustered_interval(differ)
    assert (a, b) == pytest.approx(tuple(wilson(10, 20)))
    assert (c, d) == pytest.approx(tuple(wilson(20, 40)))
    assert clustered_interval([(True, True)] * 20) == pytest.approx(wilson(20, 20))
    assert clustered_interval([]) == [0.0, 1.0]


def test_peak_breaks_ties_by_flips_then_by_index_and_needs_the_floor():
    assert peak([0.2, 0.9, 0.9], [0, 0.1, 0.5], [0, 0, 0]) == 2
    assert peak([0.9, 0.9], [0.5, 0.5], [0, 0]) == 0
    assert peak([0.1, 0.3], [0, 0], [0, 0.3]) is None
    assert peak([0.0, 0.0], [0, 0], [0, 0]) is None


def test_papers_block_is_contiguous_half_peak_and_above_the_floor():
    rates = [0.5, 0.0, 0.5, 1.0, 0.5, 0.49, 0.9]
    assert papers_block(rates, 3, [0.0] * 7) == [2, 3, 4]
    assert papers_block(rates, 3, [0, 0, 0.5, 0, 0, 0, 0]) == [3, 4]
    assert papers_block(rates, None, [0.0] * 7) == []


class Reads:
    """A model whose output flips when all of `needed` are swapped; counts what it is asked."""

    def __init__(self, *needed: int, redundant: bool = False) -> None:
        self.needed, self.redundant, self.asked = set(needed), redundant, 0

    def __call__(self, layers: range) -> float:
        self.asked += 1
        return float(self.needed <= set(layers))

    def single(self) -> list[float]:
        return [float(self.needed <= {k}) for k in range(12)]


def test_one_layer_is_found_without_sweeps():
    reads = Reads(5)
    block, details = flip_block(reads, 12, reads.single())
    assert block == [5]
    assert reads.asked == 1
    assert details == {"all_layers": 1.0}


@pytest.mark.parametrize("needed", [(3, 4), (6, 7, 8, 9, 10), (0, 11), (2, 5)])
def test_blocks_are_the_smallest_that_flip(needed):
    reads = Reads(*needed)
    block, details = flip_block(reads, 12, reads.single())
    assert block == list(range(min(needed), max(needed) + 1))
    assert details["block"] == 1.0


def test_a_model_that_never_flips_has_no_block():
    block, details = flip_block(lambda layers: 0.0, 12, ZERO)
    assert block == []
    assert details == {"all_layers": 0.0}


def test_graded_flips_respect_the_share():
    weights = [0, 0, 0, 0.05, 0.3, 0.4, 0.2, 0.05, 0, 0, 0, 0]
    block, _ = flip_block(lambda layers: sum(weights[k] for k in layers), 12, weights)
    assert block == [4, 5, 6]
