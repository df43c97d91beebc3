"""Draft and verify against decoding one token a pass, on tiny random models."""

from __future__ import annotations

import pytest
from pictures import picture
from tiny_models import LAYERS, tiny_vlm

from vfl_train.interventions import BASE, Row, drop, read_out, swap
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.readout import Cost
from vfl_train.models.generation import generate

CAP = 6


def one_token_a_pass(vlm, row: Row, cap: int = CAP) -> tuple[int, ...]:
    """Greedy decoding as it is defined; an image placeholder cannot be forced and ends it, too."""
    said, ends = (), (*vlm.eos_token_ids, vlm.image_token_id)
    while len(said) < cap and (not said or said[-1] not in ends):
        (found,) = read_out(vlm, [Row(row.prompt, said, row.branch, row.donors, ())], "reference")
        said += (found.next_token,)
    return said


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def vlm(request):
    return tiny_vlm(request.param)


@pytest.fixture
def said(vlm) -> list[tuple[Row, tuple[int, ...]]]:
    """Two prompts under the base and under drops and swaps at several layers, each drafted by the base's
    output, with what decoding token by token says. Without those that say an image placeholder."""
    prompts = [vlm.prompt("what text is written here ?", [picture(seed, 64)]) for seed in (0, 1)]
    found = []
    for host, donor in (prompts, prompts[::-1]):
        (own,) = generate(vlm, [host], CAP)
        branches = [
            BASE, *(drop(range(k, LAYERS)) for k in range(LAYERS)), drop([1], "decode"),
            swap([0], "d"), swap(range(LAYERS), "d"),
        ]  # fmt: skip
        found += [Row(host, own.tokens, branch, {"d": donor} if branch else {}) for branch in branches]
    both = [(row, one_token_a_pass(vlm, row)) for row in found]
    both = [(row, out) for row, out in both if vlm.image_token_id not in out]
    assert len({out for _, out in both}) > 3, "the branches say the same: the test shows nothing"
    return both


@pytest.fixture
def rows(said) -> list[Row]:
    return [row for row, _ in said]


@pytest.fixture
def expected(said) -> list[tuple[int, ...]]:
    return [out for _, out in said]


def other(token: int) -> int:
    """Another token, no image's placeholder."""
    return 7 if token == 5 else 5


def drafted(vlm, rows, drafts=None, cap: int = CAP) -> tuple[list[tuple[int, ...]], int]:
    """(outputs, rows read)."""
    cost = Cost()
    return generate_under(vlm, rows, cap, "reference", 8192, cost, drafts), cost.rows


def test_any_draft_gives_the_same_output(vlm, rows, expected):
    nonsense = [[(5, 5, 5), (7,), ()] for _ in rows]
    for drafts in (None, nonsense, [()] * len(rows), [[e] for e in reversed(expected)]):
        out, _ = drafted(vlm, rows, drafts)
        assert out == expected


def test_the_engine_says_the_same(vlm, rows, expected):
    cost = Cost()
    assert generate_under(vlm, rows, CAP, "engine", cost=cost) == expected
    assert cost.rows == drafted(vlm, rows)[1] and cost.reference_rows == 0


def test_drafts_only_save_passes(vlm, rows, expected):
    tokens = sum(map(len, expected))
    assert drafted(vlm, rows, [()] * len(rows))[1] == tokens, "without drafts it is one token a pass"
    assert drafted(vlm, rows, [[e] for e in expected])[1] == len(rows), "a right draft takes one pass"
    assert len(rows) < drafted(vlm, rows)[1] < tokens, "the base's output helps"


def test_a_draft_wrong_in_one_token_takes_two_passes(vlm, rows, expected):
    wrong = [[(e[0], other(e[1]), *e[2:])] for e in expected]
    assert drafted(vlm, rows, wrong) == (expected, 2 * len(rows))


def test_the_draft_that_agrees_goes_on(vlm, rows, expected):
    """After the first draft fails, the second is taken up where the output stands."""
    drafts = [[(e[0], *map(other, e[1:])), e] for e in expected]
    assert drafted(vlm, rows, drafts) == (expected, 2 * len(rows))


@pytest.mark.parametrize("cap", [1, 3])
def test_the_cap_cuts_output_and_drafts(vlm, rows, expected, cap):
    assert drafted(vlm, rows, cap=cap)[0] == [e[:cap] for e in expected]
    assert drafted(vlm, rows, [[e] for e in expected], cap)[1] == len(rows)
    assert drafted(vlm, rows, cap=0) == ([()] * len(rows), 0)


def test_any_end_token_ends_an_answer(vlm, rows, expected, monkeypatch):
    """Also inside a draft that goes on after it, and where the draft does not expect one."""
    ends = (expected[0][2], expected[1][1])
    monkeypatch.setitem(vlm.__dict__, "eos_token_ids", ends)
    cut = [e[: min([i + 1 for i, t in enumerate(e) if t in ends], default=CAP)] for e in expected]
    assert cut != expected and [one_token_a_pass(vlm, row) for row in rows] == cut
    for drafts in (None, [[e] for e in expected], [[(5, 5, 5)] for _ in rows]):
        assert drafted(vlm, rows, drafts)[0] == cut
    assert drafted(vlm, rows, [[c] for c in cut])[1] == len(rows), "the end token takes no pass of its own"


def test_an_image_placeholder_ends_an_output(vlm, rows, expected, monkeypatch):
    """Forced as an answer it would ask for an image that is not there."""
    real, placeholder = vlm.image_token_id, expected[0][2]
    drafts = [[(*e[:1], real, *e[1:])] for e in expected]
    assert drafted(vlm, rows, drafts)[0] == expected, "a draft is cut before it"
    monkeypatch.setitem(vlm.__dict__, "image_token_id", placeholder)
    assert drafted(vlm, rows[:1])[0] == [expected[0][: expected[0].index(placeholder) + 1]]
