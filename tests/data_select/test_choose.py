"""Buckets, scores and picks on plain numbers."""

from __future__ import annotations

import numpy as np
import pytest

from vfl_train.data_select import choose
from vfl_train.schemas import LANGUAGE

# --- buckets --------------------------------------------------------------------------------------


def test_deltas_are_measured_in_units_of_their_own_function():
    """A function whose answers are long shots does not swallow the rows of the others."""
    deltas = {"ocr": [10.0, 8.0, 4.0, 0.1], "count": [0.1, 0.2, 1.9, 2.0]}
    assert choose.buckets(deltas) == ["ocr", "ocr", "count", "count"]


def test_the_unit_is_the_95th_percentile_of_the_deltas_that_are_not_zero():
    values = np.arange(1, 101) / 10
    signed = values * np.where(np.arange(100) % 3, 1, -1)
    found = choose.normalised({"ocr": [*signed, 0.0, 0.0]})["ocr"]
    assert found == pytest.approx([*values / np.quantile(values, 0.95), 0.0, 0.0])


def test_a_function_nobody_needs_divides_by_nothing_small():
    found = choose.normalised({"ocr": [-1.0, 0.0], "count": [1e-9, 0.0]})
    assert all(np.isfinite(v).all() for v in found.values())
    assert abs(found["count"]).max() < 1e-3


def test_rows_that_no_layers_move_are_language():
    least = choose.MIN_CHANGE
    deltas = {"ocr": [least, least - 1e-6, 0.0], "count": [0.0, 0.0, 0.0]}
    assert choose.buckets(deltas) == ["ocr", LANGUAGE, LANGUAGE]


def test_a_row_that_is_misread_belongs_to_the_function_that_misreads_it():
    deltas = {"ocr": [2.0, -1.9, 0.1], "count": [0.1, -0.1, 3.0]}
    assert choose.buckets(deltas) == ["ocr", "ocr", "count"]


def test_equal_needs_go_to_the_first_function():
    assert choose.buckets({"ocr": [1.0], "count": [1.0]}) == ["ocr"]


# --- scores ---------------------------------------------------------------------------------------


def test_scores_of_each_method():
    bucket, deltas = ["ocr", LANGUAGE, "count"], {"ocr": [2.0, 1.0, 0.0], "count": [0.0, 0.0, 4.0]}
    score = lambda method, seed=0: choose.scores(method, bucket, deltas, [3, 1, 2], [0.5, 0.0, 0.9], seed)  # noqa: E731
    units = choose.normalised(deltas)
    assert score("vfl").tolist() == [units["ocr"][0], 0.0, units["count"][2]]
    assert score("loss").tolist() == [3, 1, 2]
    assert score("visual-gain").tolist() == [0.5, 0.0, 0.9]
    assert sorted(score("random")) == [0, 1, 2]


def test_random_scores_depend_on_the_seed_alone():
    draw = lambda seed: choose.scores("random", ["ocr"] * 50, {}, [], [], seed).tolist()  # noqa: E731
    assert draw(3) == draw(3) != draw(4)


# --- picks ----------------------------------------------------------------------------------------

BUCKET = ["ocr", "count", "ocr", "count", LANGUAGE, "ocr", "relation", "ocr"]
SCORE = np.array([0.9, 0.8, 0.1, 0.7, 0.0, 0.5, 1.0, 0.6])


def pick(budget, wanted=("ocr", "count"), **options):
    return choose.pick(budget, BUCKET, SCORE, list(wanted), **options)


def test_the_budget_is_shared_equally_and_picks_are_in_input_order():
    assert pick(4) == [0, 1, 3, 7]
    assert pick(2) == [0, 1]
    assert pick(2, ["ocr"]) == [0, 7]


def test_what_rounding_leaves_goes_to_the_best_row():
    assert pick(3) == [0, 1, 3]
    assert pick(1) == [0]


def test_what_one_bucket_cannot_use_goes_to_the_others():
    assert pick(5) == [0, 1, 3, 5, 7]
    assert pick(6) == [0, 1, 2, 3, 5, 7]


def test_the_budget_is_never_exceeded_and_may_stay_unused():
    for budget in range(10):
        assert len(pick(budget)) == min(budget, 6)
        assert len(pick(budget, fill=True)) == min(budget, 8)
    assert pick(8, ["grounding"]) == []


def test_fill_takes_the_best_rows_of_all_buckets_last():
    assert pick(3, ["count"], fill=True) == [1, 3, 6]
    assert pick(4, ["count"], fill=True) == [0, 1, 3, 6]


def test_a_mix_is_kept_to():
    assert pick(4, mix={"ocr": 0.75, "count": 0.25}) == [0, 1, 5, 7]
    assert pick(6, mix={"ocr": 0.5, "count": 0.5}) == [0, 1, 3, 5, 7], "count has two rows, ocr gets three"
    assert pick(4, mix={"ocr": 0.5}) == [0, 7]
    assert pick(4, mix={"ocr": 0.5}, fill=True) == [0, 1, 6, 7]


@pytest.mark.parametrize("budget", range(1, 8))
@pytest.mark.parametrize(
    "mix", [{"a": 0.5, "b": 0.5}, {"a": 0.3, "b": 0.3, "c": 0.4}, {"a": 0.07, "b": 0.93}]
)
def test_a_mix_of_1_uses_the_whole_budget_in_spite_of_rounding(budget, mix):
    bucket = [name for name in "abc" for _ in range(10)]
    chosen = choose.pick(budget, bucket, np.arange(30.0), list("abc"), mix)
    assert len(chosen) == budget
    for name, share in mix.items():
        assert abs(sum(bucket[i] == name for i in chosen) - budget * share) < 1


def test_ties_go_to_earlier_rows():
    assert choose.pick(2, ["ocr"] * 5, np.ones(5), ["ocr"]) == [0, 1]


def test_the_order_of_the_input_does_not_decide_otherwise():
    rng = np.random.default_rng(0)
    bucket, score = list(rng.choice(["ocr", "count", LANGUAGE], 60)), rng.permutation(60).astype(float)
    order = rng.permutation(60)
    first = choose.pick(17, bucket, score, ["count", "ocr"])
    second = choose.pick(17, [bucket[i] for i in order], score[order], ["count", "ocr"])
    assert first == sorted(order[second].tolist())


def test_overlap():
    assert choose.overlap([1, 2, 3], [2, 3, 4]) == 0.5
    assert choose.overlap([], []) == 1.0
