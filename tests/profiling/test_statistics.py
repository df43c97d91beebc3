"""Rates, intervals, peaks and blocks on plain numbers."""

from __future__ import annotations

import pytest

from vfl_train.profiling.statistics import clustered_interval, drop_plan, flip_block, papers_block, peak
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
    assert peak([0.1, 0.3], [0, 0], [0, 0.3]) == 0 and peak([0.1, 0.3], [0, 0], [0.1, 0.3]) is None
    assert peak([0.0, 0.0], [0, 0], [0, 0]) is None
    assert peak([0.9, 0.5, 0.6], [0, 0, 0], [0.95, 0.1, 0.1]) == 2  # the best of those above their floor


def test_papers_block_is_contiguous_half_peak_and_above_the_floor():
    rates = [0.5, 0.0, 0.5, 1.0, 0.5, 0.49, 0.9]
    assert papers_block(rates, 3, [0.0] * 7) == [2, 3, 4]
    assert papers_block(rates, 3, [0, 0, 0.5, 0, 0, 0, 0]) == [3, 4]
    assert papers_block(rates, None, [0.0] * 7) == []


class Reads:
    """A model of which `share(layers)` of the outputs flip when `layers` are swapped together; keeps what it
    is asked beyond the sweep."""

    def __init__(self, share) -> None:
        self.share, self.asked = share, []

    def __call__(self, sets) -> list[float]:
        self.asked += sets
        return [self.share(set(layers)) for layers in sets]

    def block(self) -> tuple[list[int], dict[str, object]]:
        single = [self.share({k}) for k in range(12)]
        from_layer = [self.share(set(range(k, 12))) for k in range(12)]
        up_to_layer = [self.share(set(range(k + 1))) for k in range(12)]
        return flip_block(self, single, from_layer, up_to_layer)


def needs(*layers: int) -> Reads:
    """Flips when all of `layers` are swapped."""
    return Reads(lambda swapped: float(set(layers) <= swapped))


def test_one_layer_is_found_in_the_sweep_alone():
    reads = needs(5)
    block, details = reads.block()
    assert block == [5] and reads.asked == []
    assert details["all_layers"] == details["block"] == 1.0
    assert details["from_layer"] == [1.0] * 6 + [0.0] * 6
    assert details["up_to_layer"] == [0.0] * 5 + [1.0] * 7


@pytest.mark.parametrize("layers", [(3, 4), (6, 7, 8, 9, 10), (0, 11), (2, 5)])
def test_blocks_are_the_smallest_that_flip(layers):
    block, details = needs(*layers).block()
    assert block == list(range(min(layers), max(layers) + 1))
    assert details["block"] == 1.0


def test_one_of_several_layers_that_each_flip_is_enough():
    block, _ = Reads(lambda swapped: float(bool(swapped & {4, 8}))).block()
    assert block == [4]


def test_a_block_between_the_bounds_that_does_not_flip_is_widened():
    """6 with one of its neighbours flips: enough from 6 on and up to 6, but not 6 alone."""
    block, details = Reads(lambda swapped: float(6 in swapped and bool(swapped & {5, 7}))).block()
    assert block in ([5, 6], [6, 7]) and details["block"] == 1.0


def test_a_model_that_never_flips_has_no_block():
    reads = Reads(lambda swapped: 0.0)
    block, details = reads.block()
    assert block == [] and reads.asked == []
    assert details["all_layers"] == 0.0 and "block" not in details


def test_graded_flips_respect_the_share():
    weights = [0, 0, 0, 0.05, 0.3, 0.4, 0.2, 0.05, 0, 0, 0, 0]
    block, details = Reads(lambda swapped: sum(weights[k] for k in swapped)).block()
    assert block == [4, 5, 6] and details["block"] == pytest.approx(0.9)


def test_the_drop_plan_is_the_first_layer_after_which_nothing_is_lost():
    accuracy = [0.2, 0.99, 0.5, 0.98, 0.995, 1.0]
    assert drop_plan(accuracy, 1.0) == pytest.approx(
        {"from_layer": 4, "points_lost": 0.5, "allowed_points": 1.0}
    )
    assert drop_plan(accuracy, 2.0)["from_layer"] == 3
    assert drop_plan(accuracy, 100)["from_layer"] == 0
    # 5 layers: from 5 on there is none to drop.
    assert drop_plan([0.0] * 5 + [1.0], 1.0) == {"from_layer": 5, "points_lost": 0.0, "allowed_points": 1.0}
    assert drop_plan([0.99, 1.0], 1.0)["from_layer"] == 0  # exactly the allowed points, rounded
