"""Needs, buckets, scores and picks on plain numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vfl_train.data_select import choose
from vfl_train.schemas import LANGUAGE

# --- needs and buckets ------------------------------------------------------------------------------


def from_odds(full: list[float], **without: list[float]):
    """(needs, deltas) of rows whose answers have these log-odds in full and without a function's layers."""
    loss = lambda odds: np.logaddexp(0, -np.asarray(odds, dtype=float))  # noqa: E731
    losses = {name: loss(odds) for name, odds in without.items()}
    deltas = {name: losses[name] - loss(full) for name in losses}
    return choose.needs(losses, deltas), deltas


def test_log_odds_of_a_probability():
    for p in (0.999, 0.5, 0.2, 1e-4):
        assert choose.log_odds([-math.log(p)])[0] == pytest.approx(math.log(p / (1 - p)))
    assert np.isfinite(choose.log_odds([0.0, 80.0])).all(), "what float32 rounds away has an end"


def test_a_need_is_the_change_of_the_odds_either_way():
    need, _ = from_odds([3.0, -2.0, 0.0], ocr=[1.0, 2.5, 0.0])
    assert need["ocr"] == pytest.approx([2.0, 4.5, 0.0])


def test_a_need_is_measured_from_the_deltas_own_reference():
    """`nested`: each level is compared with the next shallower one, not with the full model."""
    loss = lambda odds: np.logaddexp(0, -np.array([odds], dtype=float))  # noqa: E731
    losses = {"ocr": loss(2.0), "count": loss(-1.0)}
    deltas = {"ocr": losses["ocr"] - loss(5.0), "count": losses["count"] - losses["ocr"]}
    need = choose.needs(losses, deltas)
    assert (need["ocr"][0], need["count"][0]) == (pytest.approx(3.0), pytest.approx(3.0))


def test_a_row_that_the_model_guesses_blind_is_in_its_functions_bucket():
    """Both losses are near 0, the odds are not: 5e-6 and 1e-3 nats without the image."""
    need, deltas = from_odds([12.2], relation=[6.9], count=[12.0])
    assert deltas["relation"][0] < 0.002
    assert choose.buckets(need, deltas).tolist() == ["relation"]


def test_a_row_that_is_misread_belongs_to_the_function_that_misreads_it():
    need, deltas = from_odds([5.0, -4.0, 5.0], ocr=[1.0, 0.0, 4.9], count=[4.9, -4.1, 0.0])
    assert choose.buckets(need, deltas).tolist() == ["ocr", "ocr", "count"]


def test_rows_that_no_layers_move_are_language():
    least = choose.MIN_ODDS
    need, deltas = from_odds([12.0] * 3, ocr=[12 - least - 1e-3, 12 - least + 1e-2, 12.0], count=[12.0] * 3)
    assert choose.buckets(need, deltas).tolist() == ["ocr", LANGUAGE, LANGUAGE]


def test_a_change_of_the_loss_counts_where_the_odds_move_little():
    need, deltas = from_odds([-3.0, -3.0], ocr=[-3.1, -3.04])
    assert deltas["ocr"][0] > choose.MIN_CHANGE > deltas["ocr"][1] > 0
    assert choose.buckets(need, deltas).tolist() == ["ocr", LANGUAGE]


def test_what_counts_as_a_need_is_read_off_the_rows_that_need_another_function():
    """ocr's layers stir all answers by up to 2 nats, relation's by up to 0.2: 1 nat is a need of relation."""
    n = choose.USUAL_ROWS
    stir = np.linspace(0, 1, n)
    need = {
        "count": np.r_[np.full(n, 5.0), 0.0, 0.0],
        "ocr": np.r_[2 * stir, 1.0, 0.0],
        "relation": np.r_[0.2 * stir, 0.0, 1.0],
    }
    deltas = dict.fromkeys(need, np.full(n + 2, 1e-6))
    usual = choose.usual(need)
    assert usual["count"] == choose.MIN_ODDS, "nothing else is needed by enough rows"
    assert (usual["ocr"], usual["relation"]) == (pytest.approx(1.95), pytest.approx(0.195))
    assert choose.buckets(need, deltas).tolist()[-2:] == [LANGUAGE, "relation"]
    fewer = {name: values[1:] for name, values in need.items()}
    assert set(choose.usual(fewer).values()) == {choose.MIN_ODDS}


def test_a_row_that_nothing_moves_is_language_however_little_is_usual():
    need = {"count": np.r_[np.full(200, 5.0), 0.0], "ocr": np.zeros(201)}
    assert choose.usual(need)["ocr"] == 0
    assert choose.buckets(need, dict.fromkeys(need, np.zeros(201))).tolist()[-1] == LANGUAGE


def test_equal_needs_go_to_the_first_function():
    need, deltas = from_odds([5.0], ocr=[1.0], count=[1.0])
    assert choose.buckets(need, deltas).tolist() == ["ocr"]


# --- labels in doubt --------------------------------------------------------------------------------


def test_labels_are_doubted_where_the_image_speaks_against_them_and_the_loss_is_far_out():
    loss = np.array([*np.linspace(0.0, 0.4, 30), 6.0, 6.0, 0.9])
    gain = np.array([2.0] * 30 + [-4.0, 1.0, -0.8])
    doubted = choose.suspicious(np.array(["ocr"] * 33), loss, gain)
    assert np.flatnonzero(doubted).tolist() == [30], "a hard row that the image helps, a small loss: no doubt"


def test_a_loss_is_far_out_among_its_own_bucket():
    """Long answers read from a picture may all have a loss that would be odd among single words."""
    loss = np.array([*np.linspace(0, 0.2, 20), *np.linspace(2, 6, 20), 4.0])
    bucket = np.array(["count"] * 20 + ["ocr"] * 20 + ["count"])
    doubted = choose.suspicious(bucket, loss, np.full(41, -3.0))
    assert np.flatnonzero(doubted).tolist() == [40]


# --- scores ---------------------------------------------------------------------------------------


def test_scores_of_each_method():
    bucket = np.array(["ocr", LANGUAGE, "count"])
    need = {"ocr": np.array([2.0, 1.0, 9.0]), "count": np.array([0.0, 0.0, 4.0])}
    score = lambda method, seed=0: choose.scores(method, bucket, need, [3, 1, 2], [0.5, 0.0, 0.9], seed)  # noqa: E731
    assert score("vfl").tolist() == [2.0, 0.0, 4.0]
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
    return choose.pick(budget, BUCKET, SCORE, list(wanted), **options).tolist()


def only(*positions):
    """Bool [8], true there."""
    return np.isin(np.arange(8), positions)


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
    assert choose.pick(2, ["ocr"] * 5, np.ones(5), ["ocr"]).tolist() == [0, 1]


def test_rows_in_doubt_come_last_and_duplicates_never():
    assert pick(2, ["ocr"], last=only(0)) == [5, 7]
    assert pick(4, ["ocr"], last=only(0)) == [0, 2, 5, 7], "the budget has room for all"
    assert pick(8, ["ocr"], never=only(0), fill=True) == [1, 2, 3, 4, 5, 6, 7]


def test_no_source_gives_more_than_its_cap():
    """Sources a (even positions) and b: in every stage the best of each, in the order of scores."""
    capped = {"source": np.arange(8) % 2, "cap": 2}
    assert pick(4, ["ocr"], **capped) == [0, 2, 5, 7]
    assert pick(3, ["ocr"], source=np.arange(8) % 2, cap=1) == [0, 7]
    assert pick(8, ["count"], **capped, fill=True) == [0, 1, 3, 6], "count used up b, the best of a fills"
    for cap in range(1, 5):
        chosen = np.array(pick(8, source=np.arange(8) % 2, cap=cap, fill=True))
        assert np.bincount(chosen % 2).tolist() == [cap, cap]


def test_the_order_of_the_input_does_not_decide_otherwise():
    rng = np.random.default_rng(0)
    bucket, score = rng.choice(["ocr", "count", LANGUAGE], 60), rng.permutation(60).astype(float)
    order = rng.permutation(60)
    first = choose.pick(17, bucket, score, ["count", "ocr"])
    second = choose.pick(17, bucket[order], score[order], ["count", "ocr"])
    assert first.tolist() == sorted(order[second].tolist())


def test_overlap():
    assert choose.overlap([1, 2, 3], [2, 3, 4]) == 0.5
    assert choose.overlap([], []) == 1.0
