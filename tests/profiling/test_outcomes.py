"""Outcomes without generating: forced outputs decide what brute force decides, at a fraction of the rows."""

from __future__ import annotations

import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfl_train.functions.matching import matches
from vfl_train.interventions import BASE, ReadOut, Row, drop, read_out, swap
from vfl_train.interventions.generation import generate_under
from vfl_train.phantom.architecture import LAYERS
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling.outcomes import Trial, settled
from vfl_train.profiling.sweep import DONOR, MAX_ANSWER_TOKENS, Direction, Sweeper

END = 99
KEYS = [range(k, k + 1) for k in range(LAYERS)] + [range(k, LAYERS) for k in range(0, LAYERS, 3)]
BRANCHES = [swap(layers, DONOR) for layers in KEYS] + [drop(range(k, LAYERS)) for k in (0, 6, 9, 11)] + [BASE]


def forced(answer: tuple[int, ...], predicted: tuple[int, ...]) -> ReadOut:
    return ReadOut(
        (0.0,) * len(answer), predicted, tuple(a == p for a, p in zip(answer, predicted, strict=True))
    )


def trial(*tries: tuple[int, ...]) -> Trial:
    return Trial(None, BASE, {}, tries)  # type: ignore[arg-type]


def test_the_other_output_is_tried_only_where_it_agrees_up_to_the_first_difference():
    own, other = (1, 2, 3, END), (1, 5, 6, END)
    t = trial(own, other)
    assert t.next_try() == own
    t.learn(own, forced(own, (1, 5, 3, END)), (END,), 32)  # says 1 5, as the other does
    assert t.known == (1, 5) and t.next_try() == other
    t.learn(other, forced(other, (1, 5, 6, 7)), (END,), 32)
    assert t.known == (1, 5, 6, 7) and not t.complete and t.next_try() is None

    t = trial(own, other)
    t.learn(own, forced(own, (1, 4, 3, END)), (END,), 32)  # says 1 4: neither
    assert t.next_try() is None and not t.complete
    t = trial(own, other)
    t.learn(own, forced(own, (1, 2, 3, 8)), (END,), 32)  # agrees with own beyond where the other differs
    assert t.next_try() is None


def test_a_beginning_that_ends_is_the_whole_output():
    own, other = (1, 2, 3, END), (1, END)
    t = trial(own, other)
    t.learn(own, forced(own, (1, END, 3, END)), (END,), 32)
    assert t.complete and t.known == other and t.next_try() is None
    t = trial(own)
    t.learn(own, forced(own, (1, 2, 3, 4)), (END,), 4)  # cut at the cap
    assert t.complete and t.known == (1, 2, 3, 4)


@pytest.fixture(scope="module", params=["engine", "reference"])
def sweeper(phantom, request) -> Sweeper:
    return Sweeper(phantom, "text", request.param, 8192, "ocr")


@pytest.fixture(scope="module")
def directions(phantom) -> list[Direction]:
    pairs = [p for pairs in probe_set({"ocr": 2, "grounding": 1}, 5).pairs.values() for p in pairs]
    sweeper = Sweeper(phantom, "text", "reference", 8192)
    return [d for chunk in sweeper.answered(pairs) for _, *both in chunk for d in both]


def rows_of(directions: list[Direction], answer: str, branches=BRANCHES) -> list[Row]:
    """Every branch on every direction, forcing `own` or `other`."""
    return [
        Row(d.host, getattr(d, answer).tokens, branch, {DONOR: d.donor})
        for d in directions
        for branch in branches
    ]


def generated(phantom, directions, branches=BRANCHES) -> list[str]:
    """What every branch makes the model say of every direction, one token at a time."""
    rows = rows_of(directions, "own", branches)
    said = generate_under(phantom, rows, MAX_ANSWER_TOKENS, "engine", drafts=[()] * len(rows))
    return [phantom.decode(tokens) for tokens in said]


@pytest.fixture(scope="module")
def brute(phantom, directions) -> tuple[list[bool], list[bool], list[str]]:
    """By direction and branch: whether own and other hold; by direction and drop: the generated text."""
    own, other = (
        [r.holds for r in read_out(phantom, rows_of(directions, answer), "reference")]
        for answer in ("own", "other")
    )
    return own, other, generated(phantom, directions, BRANCHES[len(KEYS) :])


def test_outcomes_are_those_of_brute_force(sweeper, directions, brute):
    assert len(directions) == 6
    own, other, dropped = brute
    found = sweeper.outcomes(directions, BRANCHES)
    for n, d in enumerate(directions):
        for i, of_branch in enumerate(found):
            outcome, at = of_branch[n], n * len(BRANCHES) + i
            assert outcome.changed == (not own[at])
            if i < len(KEYS):
                assert outcome.flipped == other[at]
            else:
                text = dropped[n * (len(BRANCHES) - len(KEYS)) + i - len(KEYS)]
                assert outcome.right == matches(text, d.answer) and not outcome.flipped
    assert any(own) and not all(own) and any(other)


def test_outcomes_need_few_rows_more_than_one_a_branch(phantom, directions):
    sweeper = Sweeper(phantom, "text", "engine", 8192)
    found = sweeper.outcomes(directions, BRANCHES)
    rows, flips = len(directions) * len(BRANCHES), sum(o.flipped for of in found for o in of)
    neither = sum(o.changed and not o.flipped for of in found for o in of)
    assert rows + flips <= sweeper.cost.rows < rows + flips + neither < 2 * rows


@pytest.mark.parametrize("match", ["choice", "iou"])
def test_loosely_judged_outcomes_are_those_of_generated_outputs(phantom, directions, match):
    sweeper = Sweeper(phantom, "text", "engine", 8192)
    loose = [replace(d, match=match) for d in directions[:2]]
    if match == "iou":  # of boxes that no output here gives: everything must be generated
        loose = [replace(d, answer="1,1,9,9", other_answer="3,3,9,9") for d in loose[:1]]
    found = sweeper.outcomes(loose, BRANCHES)
    for i, text in enumerate(generated(phantom, loose)):
        d, branch = loose[i // len(BRANCHES)], i % len(BRANCHES)
        outcome = found[branch][i // len(BRANCHES)]
        assert outcome.changed == (not matches(text, d.answer, match)) == (not outcome.right)
        assert outcome.flipped == (branch < len(KEYS) and matches(text, d.other_answer, match))


TEXTS = ["a", "b", "A.", "(b)", "the", "car", "red", "no", "no-one", "-", "nose", "7", ",", "?"]
WORDS = st.lists(st.sampled_from(TEXTS), max_size=5)


@given(
    output=WORDS.map(" ".join) | st.text(string.ascii_letters + " .,(", max_size=9),
    cut=st.integers(0, 12),
    expected=st.sampled_from(["a", "b. the car", "no", "the red car", "7", "A. red"]),
    match=st.sampled_from(["exact", "choice"]),
)
def test_what_a_beginning_settles_holds_for_the_whole_output(output, cut, expected, match):
    verdict = settled(output[:cut].strip(), expected, match)
    assert verdict is None or verdict == matches(output, expected, match)


def test_what_a_beginning_settles():
    assert settled("ye", "no", "exact") is False and settled("n", "no", "exact") is None
    assert settled("no", "no", "exact") is None  # "no" or "nothing"
    assert settled("no,", "no", "choice") is None and settled("nothing", "no", "choice") is False
    assert settled("no it is", "no", "choice") is True
    assert settled("b", "b. the car", "choice") is None and settled("c", "b. the bus", "choice") is False
    assert settled("1,2,3", "1,2,3,4", "iou") is None
    assert settled("caf\ufffd", "café", "exact") is None  # half a character is no difference
