"""The choice of a layer, on numbers made up: power, level, what is refused; and the paired interval."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vfl_train.errors import DataError
from vfl_train.knockout.choice import (
    LEVEL,
    MIN_MARGIN,
    MIN_SHOTS,
    binomial_tail,
    choose,
    constant_share,
    draw_shots,
    max_rank_test,
    paired_gain,
)

SHOTS, LAYERS = 10, 12
ANSWERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def outcome(seed: int, layer: int | None = 4, gain: float = 1.0, base: float = 0.3):
    """(right, logprob) [SHOTS, 1 + LAYERS]: layer 0 is needed, `layer` interferes, the others do little."""
    g = rng(seed)
    logprob = np.full((SHOTS, 1 + LAYERS), -2.0) + g.normal(0, 0.3, (SHOTS, 1 + LAYERS))
    right = g.random((SHOTS, 1)) < np.full((SHOTS, 1 + LAYERS), base)
    logprob[:, 1] -= 8
    right[:, 1] = False
    if layer is not None:
        logprob[:, 1 + layer] = logprob[:, 0] + gain + g.exponential(1.0, SHOTS)
        right[:, 1 + layer] = True
    return right, logprob


def test_an_interfering_layer_is_found():
    right, logprob = outcome(0)
    found = choose(right, logprob, ANSWERS, rng())
    assert (found.layer, found.candidate, found.reason) == (4, 4, "")
    assert found.p_value <= LEVEL
    assert found.margin[4] == pytest.approx((logprob[:, 5] - logprob[:, 0]).mean())
    assert found.interaction[4] == 100 - 10 * right[:, 0].sum() and found.interaction[0] <= 0
    assert found.accuracy == right[:, 0].mean()


@pytest.mark.parametrize("shots", [6, 10, 40])
def test_the_test_holds_its_level(shots):
    """Symmetric margins, layers that go together, one with a hundred times the spread: no layer gains, and
    the best one passes in at most 5 % of 400 trials, but for chance (three standard errors)."""
    scale = np.array([1.0] * (LAYERS - 1) + [100.0])
    passed = 0
    for seed in range(400):
        g = rng(seed)
        gains = scale * (g.standard_t(2, (shots, LAYERS)) + g.standard_t(2, (shots, 1)))
        passed += max_rank_test(gains, int(gains.mean(0).argmax()), g) <= LEVEL
    assert passed / 400 <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / 400) ** 0.5


def test_the_uncorrected_test_would_not_hold_it():
    """Picking the best of L and testing it alone: the reason for the correction."""
    passed = 0
    for seed in range(200):
        gains = rng(seed).normal(size=(SHOTS, LAYERS))
        best = int(gains.mean(0).argmax())
        passed += max_rank_test(gains[:, [best]], 0, rng(seed)) <= LEVEL
    assert passed / 200 > 3 * LEVEL


def test_the_exact_test_counts_all_sign_flips():
    gains = rng(3).normal(size=(5, 3))
    ranks = np.argsort(np.argsort(np.abs(gains), axis=0), axis=0) + 1
    signed = np.sign(gains) * ranks
    for layer in range(3):
        flipped = [max(np.array(s) @ signed) for s in itertools.product((1, -1), repeat=5)]
        expected = np.mean([f >= signed[:, layer].sum() - 1e-9 for f in flipped])
        assert max_rank_test(gains, layer, rng()) == pytest.approx(expected)


def test_a_layer_that_is_needed_does_not_hide_one_that_interferes():
    """Under sign flips its margins of a hundred nats are huge gains; ranks bound them."""
    right, logprob = outcome(1)
    logprob[:, 1] -= 1000
    assert choose(right, logprob, ANSWERS, rng()).layer == 4


def test_a_tie_goes_to_the_smaller_index():
    right, logprob = outcome(2, layer=3)
    right[:, 9], logprob[:, 9] = right[:, 4], logprob[:, 4]
    assert choose(right, logprob, ANSWERS, rng()).layer == 3


@pytest.mark.parametrize("change", ["small margin", "no more right", "as the commonest answer", "few shots"])
def test_weak_evidence_is_abstained_from(change):
    right, logprob = outcome(0)
    answers, words = ANSWERS, "within chance"
    if change == "small margin":  # on every shot, and still nothing that interferes
        logprob[:, 5] = logprob[:, 0] + 0.9 * MIN_MARGIN
        logprob[:, 6:] = logprob[:, 2:5] = logprob[:, :1]
    elif change == "no more right":
        right[:, 5], words = right[:, 0], "not clearly more shots"
    elif change == "as the commonest answer":
        right[:, 0], right[:, 5] = False, np.arange(SHOTS) < 6
        answers, words = ["yes"] * 6 + ["no"] * 4, "commonest answer"
    else:
        right, logprob, answers = right[:4], logprob[:4], ANSWERS[:4]
    found = choose(right, logprob, answers, rng())
    assert found.layer is None and words in found.reason
    assert found.candidate == 4


def test_labels_that_nobody_can_know_are_abstained_from():
    """A model sure of its own answers; without the layer that it reads them with, it is sure of none: every
    label becomes likelier, by nats, on all shots that it answers wrong."""
    chosen = 0
    for seed in range(200):
        g = rng(seed)
        labels = g.integers(0, 4, SHOTS)
        said = g.integers(0, 4, (SHOTS, 1 + LAYERS))
        said[:, : 1 + LAYERS - 1] = said[:, :1]
        right = said == labels[:, None]
        logprob = np.where(right, -0.01, -6.0) + g.normal(0, 0.05, right.shape)
        logprob[:, -1] = np.log(0.25) + g.normal(0, 0.3, SHOTS)
        chosen += choose(right, logprob, [str(k) for k in labels], g).layer is not None
    assert chosen / 200 <= LEVEL


def flattened(seed: int, shots: int, layers: int = 28):
    """A 4-way task, half answered right (a third is known, the rest guessed), all with conviction. Without
    any of layers 0 to 7 the convictions shrink and blur: wrong labels become likelier, nothing is gained."""
    g = np.random.default_rng([seed, shots])
    labels = g.integers(0, 4, shots)
    said = np.where(g.random(shots) < 1 / 3, labels, g.integers(0, 4, shots))
    scores = g.normal(0, 0.3, (shots, 1 + layers, 4))
    scores[np.arange(shots), :, said] += 6
    scores[:, 1:9] = 0.2 * scores[:, 1:9] + g.normal(0, 0.7, (shots, 8, 4))
    logprob = (scores - np.log(np.exp(scores).sum(-1, keepdims=True)))[np.arange(shots), :, labels]
    return scores.argmax(-1) == labels[:, None], logprob, [str(k) for k in labels], g


@pytest.mark.parametrize("shots", [10, 40, 80])
def test_convictions_lost_are_nothing_gained(shots):
    found = [choose(*flattened(seed, shots)) for seed in range(200)]
    assert sum(c.layer is not None for c in found) / 200 <= LEVEL
    if shots == 80:  # else the margins abstain and nothing shows that the other tests do
        assert sum(c.p_value <= LEVEL for c in found) / 200 >= 0.5


def random_tasks(seed: int, tasks: int, shots: int = 10):
    """Labels that nobody can know, of two answers a task; untouched the model is sure of another task's
    answer, without the last layer of the commoner answer of this one."""
    g = np.random.default_rng([seed, tasks])
    names = np.repeat(np.arange(tasks), shots)
    labels = g.random(tasks * shots) < 0.4
    right = np.zeros((tasks * shots, 1 + LAYERS), bool)
    right[:, -1] = ~labels
    logprob = -6 + g.normal(0, 0.05, right.shape)
    logprob[:, -1] = np.where(labels, np.log(0.4), np.log(0.6)) + g.normal(0, 0.3, tasks * shots)
    answers = [f"{'no' if label else 'yes'} {name}" for name, label in zip(names, labels, strict=True)]
    return right, logprob, answers, g, [str(name) for name in names]


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_random_labels_of_several_tasks_are_abstained_from(tasks):
    """Of all answers together the commonest is rare; each task has its own."""
    chosen, alone = 0, 0
    for seed in range(200):
        right, logprob, answers, g, names = random_tasks(seed, tasks)
        chosen += choose(right, logprob, answers, g, tasks=names).layer is not None
        alone += choose(right, logprob, answers, g).layer is not None
    assert chosen / 200 <= LEVEL < alone / 200


@pytest.mark.parametrize(
    ("answers", "match", "tasks", "share"),
    [
        (["Yes", "yes.", "no", "one", "two", "two"], "exact", "aaabbb", 4 / 6),
        (["Yes", "yes.", "no", "one", "two", "two"], "exact", None, 2 / 6),
        (["A. cat", "A. dog", "(A) cow", "B. cat"], "choice", None, 3 / 4),
        (["A. cat", "A. dog", "(A) cow", "B. cat"], "exact", None, 1 / 4),
        (["0 0 10 10", "1 0 10 10", "0 0 10 9", "50 50 60 60"], "iou", None, 3 / 4),
    ],
)
def test_the_share_of_a_constant_answer(answers, match, tasks, share):
    assert constant_share(answers, match, tasks) == share


def test_fewer_shots_than_the_minimum_never_suffice():
    for shots, enough in ((MIN_SHOTS - 1, False), (MIN_SHOTS, True)):
        right = np.tile([False, True, False], (shots, 1))
        logprob = np.tile([-5.0, -0.1, -5.0], (shots, 1))
        found = choose(right, logprob, ANSWERS[:shots], rng())
        assert (found.layer == 0) == enough and (found.p_value <= LEVEL) == enough


def test_shots_hold_every_answer_as_often_as_the_rows_do():
    answers = ["A. x", "A. y"] * 10 + ["B. x"] * 15 + ["C"] * 5
    for seed in range(20):
        drawn = [answers[i][0] for i in draw_shots(answers, 8, rng(seed), "choice")]
        assert [drawn.count(letter) for letter in "ABC"] == [4, 3, 1]
    with pytest.raises(DataError, match="are the same"):
        draw_shots(["A. x", "A. y"], 1, rng(), "choice")


def test_shots_are_drawn_by_the_seed_and_have_two_answers():
    answers = ["yes"] * 40 + ["no"]
    drawn = [draw_shots(answers, 10, rng(seed)) for seed in range(20)]
    assert all(len(set(d)) == 10 and {answers[i] for i in d} == {"yes", "no"} for d in drawn)
    assert drawn[0] == draw_shots(answers, 10, rng(0)) and len(set(map(tuple, drawn))) == 20
    with pytest.raises(DataError, match=r"all 3 answers are the same: 'Yes\.'"):
        draw_shots(["Yes.", "yes", "YES"], 2, rng())


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (0, 0, 0, 50), (10, 0, 20, 0), (1, 2, 3, 4)])
def test_the_paired_interval_is_symmetric(table):
    """`table`: both right, lost, won, neither. Changing before and after changes the sign."""
    both, lost, won, neither = table
    before = [True] * (both + lost) + [False] * (won + neither)
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    gain, (low, high) = paired_gain(before, after)
    assert gain == pytest.approx(100 * (won - lost) / sum(table))
    back, (back_low, back_high) = paired_gain(after, before)
    assert (back, back_low, back_high) == pytest.approx((-gain, -high, -low))
    assert low <= gain <= high


def test_the_paired_interval_covers():
    """95 % of the time, on correlated samples of 30 (four standard errors of 1000 trials)."""
    g, inside = rng(5), 0
    for _ in range(1000):
        u, v = g.random(30), g.random(30)
        before, after = u < 0.5, np.where(g.random(30) < 0.6, u, v) < 0.7
        _, (low, high) = paired_gain(before.tolist(), after.tolist())
        inside += low <= 20 <= high
    assert inside / 1000 >= 0.95 - 4 * (0.95 * 0.05 / 1000) ** 0.5


def test_the_binomial_tail():
    assert binomial_tail(10, 10, 0.5) == 2**-10
    assert binomial_tail(0, 10, 0.3) == pytest.approx(1)
    assert binomial_tail(9, 10, 0.5) == pytest.approx(11 / 1024)
