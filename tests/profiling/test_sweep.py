"""The measuring loop: chunks, light handles, and pairs that a model cannot take."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from PIL import Image

from vfl_train.config import ProfileConfig
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.probes import LoadedPair
from vfl_train.interventions import BASE, swap
from vfl_train.models.generation import Generated
from vfl_train.phantom.architecture import LAYERS, PLANTED
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling import measure, sweep
from vfl_train.profiling.branches import BASE_KEY, branch_of, first_layers, sweep_keys
from vfl_train.profiling.controls import CACHED, controls, partner
from vfl_train.profiling.interaction import interaction
from vfl_train.profiling.sweep import DONOR, AnsweredPair, Sweeper
from vfl_train.schemas import ProbePair


def sweeper_of(phantom, label: str = "emotion") -> Sweeper:
    return Sweeper(phantom, "text", "engine", 8192, label)


def answered_of(phantom, function: str, count: int, seed: int = 3) -> list[AnsweredPair]:
    pairs = probe_set({function: count}, seed).pairs[function]
    found = [p for chunk in sweeper_of(phantom).answered(pairs) for p, _, _ in chunk]
    assert len(found) == count
    return found


# --- branches --------------------------------------------------------------------------------------


def test_a_sweep_asks_every_layer_set_once():
    keys = sweep_keys("swap", 5)
    assert len(keys) == len(set(keys)) == 1 + (3 * 5 - 3) + 5 and keys[0] == BASE_KEY
    for layers in (
        [range(k, k + 1) for k in range(5)],
        [range(k, 5) for k in range(5)],
        [range(k + 1) for k in range(5)],
    ):
        assert {("swap", r) for r in layers} <= set(keys)
    assert {("drop", range(k, 5)) for k in range(5)} <= set(keys)
    assert sweep_keys("drop", 3) == [BASE_KEY, *(("drop", range(k, k + 1)) for k in range(3))]
    assert sweep_keys("drop-from", 3) == [BASE_KEY, *(("drop", range(k, 3)) for k in range(3))]


def test_branches_of_keys():
    assert branch_of(BASE_KEY, "text") == BASE
    (item,) = branch_of(("swap", range(2, 4)), "decode")
    assert (item.kind, item.layers, item.donor, item.phase) == ("swap", {2, 3}, DONOR, "decode")
    assert first_layers(sweep_keys("drop-from", 3)) == [0, 0, 1, 2]


# --- chunks ----------------------------------------------------------------------------------------


def test_a_chunk_is_full_with_enough_tokens(phantom, monkeypatch):
    pairs = probe_set({"emotion": 5}, 3).pairs["emotion"]
    length = sweeper_of(phantom).encode(pairs[0])[0].length
    for tokens, sizes in ((4 * length, [2, 2, 1]), (1, [1] * 5), (100 * length, [5])):
        monkeypatch.setattr(sweep, "CHUNK_TOKENS", tokens)
        assert [len(chunk) for chunk in sweeper_of(phantom).answered(pairs)] == sizes


def test_an_output_with_the_image_placeholder_is_unanswered(phantom, monkeypatch):
    """Forcing it would ask the model for an image that is not there."""
    pairs, plain = probe_set({"emotion": 2}, 3).pairs["emotion"], sweep.generate

    def with_placeholder(vlm, prompts, *rest):
        first, *others = plain(vlm, prompts, *rest)
        return [Generated((vlm.image_token_id, *first.tokens), first.text), *others]

    monkeypatch.setattr(sweep, "generate", with_placeholder)
    ((kept,),) = sweeper_of(phantom).answered(pairs)
    assert kept[0].loaded is pairs[1]


def test_boxes_may_be_longer_than_other_answers(phantom, monkeypatch):
    """Each pair of a mixed function has its own cap, and outputs come back to their pair."""
    short, box, other = probe_set({"emotion": 3}, 3).pairs["emotion"]
    box = with_line(box, 2, pair={"match": "iou", "answer_a": "0,0,9,9", "answer_b": "20,20,29,29"})
    caps = []

    def generate(vlm, prompts, cap, batch_tokens):
        caps.append((cap, len(prompts)))
        said = [box] if cap == 64 else [short, other]
        return [Generated((7,), text) for p in said for text in (p.pair.answer_a, p.pair.answer_b)]

    monkeypatch.setattr(sweep, "generate", generate)
    (chunk,) = sweeper_of(phantom).answered([short, box, other])
    assert caps == [(32, 4), (64, 2)]
    assert [kept[0].loaded for kept in chunk] == [short, box, other]
    assert [kept[1].cap for kept in chunk] == [32, 64, 32]


def test_pixels_are_held_for_one_chunk_at_a_time(phantom, monkeypatch):
    """And the outcomes do not depend on the chunks."""
    pairs = probe_set({"emotion": 6}, 3).pairs["emotion"]
    branches = [swap([k], DONOR) for k in range(2, 5)]

    def outcomes():
        sweeper = sweeper_of(phantom)
        return [
            sweeper.outcomes([d for _, *both in chunk for d in both], branches)
            for chunk in sweeper.answered(pairs)
        ]

    (whole,) = outcomes()
    alive: weakref.WeakSet = weakref.WeakSet()
    most, plain = 0, phantom.prompt

    def counted(*args):
        nonlocal most
        prompt = plain(*args)
        alive.add(prompt)
        most = max(most, len(alive))
        return prompt

    monkeypatch.setattr(sweep, "CHUNK", 2)
    monkeypatch.setattr(phantom, "prompt", counted)
    parts = outcomes()
    assert len(parts) == 3 and most <= 2 * 2 * 2  # the chunk at hand and the one before it
    assert [[o for part in parts for o in part[i]] for i in range(3)] == whole
    found = [p for chunk in sweeper_of(phantom).answered(pairs) for p, _, _ in chunk]
    most = 0
    controls(sweeper_of(phantom), found, 6)
    assert most <= 2 * 2 * 2 + 2 * CACHED


# --- controls and interaction ----------------------------------------------------------------------


def test_partners_share_question_and_grid_and_come_from_another_pair(phantom):
    found = answered_of(phantom, "emotion", 4)
    for i in range(4):
        for side in (0, 1):
            host = found[i].loaded.pair.answer_b if side else found[i].loaded.pair.answer_a
            for same in (True, False):
                j, other = partner(found, (i, side), same) or (None, None)
                assert j not in (i, None)
                answer = found[j].loaded.pair.answer_b if other else found[j].loaded.pair.answer_a
                assert (answer == host) == same
    assert partner(found[:1], (0, 0), True) is None


def test_controls_of_one_pair_have_no_partners(phantom):
    found, directions = controls(sweeper_of(phantom), answered_of(phantom, "emotion", 1), 4)
    assert directions == {"self": 2, "nuisance": 0, "unrelated": 0, "noise": 2}
    assert found["nuisance"] == found["unrelated"] == []
    assert found["self"] == [0.0] * LAYERS and len(found["noise"]) == LAYERS
    nothing, _ = controls(sweeper_of(phantom), answered_of(phantom, "emotion", 2), 0)
    assert nothing == {name: [] for name in found}


def test_the_self_control_swaps_in_a_copy_of_the_host(phantom, monkeypatch):
    """A donor that is the host itself would be recognised, and nothing swapped."""
    donors, judge = [], Sweeper.judge

    def note(self, asks, *rest):
        donors.extend((ask.direction.host, ask.donor) for ask in asks if ask.branch[0].donor == DONOR)
        return judge(self, asks, *rest)

    found = answered_of(phantom, "emotion", 1)
    monkeypatch.setattr(Sweeper, "judge", note)
    controls(sweeper_of(phantom), found, 1)
    assert len(donors) == 2 * LAYERS
    assert all(donor is not host and donor.inputs is host.inputs for host, donor in donors)


def boxed(question: str, answer_a: str, answer_b: str, tokens: tuple[int, ...]) -> AnsweredPair:
    image = Image.new("RGB", (8, 8))
    loaded = LoadedPair(1, ProbePair("f", "a", "b", question, answer_a, answer_b, "iou"), image, image)
    return AnsweredPair(loaded, Generated(tokens, answer_a), Generated((*tokens, 0), answer_b), ((1, 2, 2),))


def test_boxes_are_alike_as_they_are_judged_and_equal_ones_come_first():
    host = boxed("where ?", "0,0,10,10", "50,50,60,60", (1,))
    near = boxed("where ?", "0,0,10,9", "80,80,90,90", (2,))
    equal = boxed("where ?", "20,20,30,30", "0,0,10,10", (3,))
    assert partner([host, near], (0, 0), True) == (1, 0)
    assert partner([host, near, equal], (0, 0), True) == (2, 1)
    assert partner([host, near], (0, 0), False) == (1, 1)
    assert partner([host, boxed("what ?", "0,0,10,10", "1,1,2,2", (4,))], (0, 0), True) is None


def test_a_floor_without_nuisance_swaps_is_told(phantom, capsys, monkeypatch):
    monkeypatch.setattr(measure, "MIN_ANSWERED_PAIRS", 1)
    config = ProfileConfig(output=Path("unused"), control_pairs=1, model="phantom")
    pairs = probe_set({"emotion": 1}, 3).pairs["emotion"]
    found = measure.measure_function(sweeper_of(phantom), pairs, config).function
    assert found.details["control_directions"]["nuisance"] == 0
    assert capsys.readouterr().out.startswith("emotion: no answered pairs share question and answer")


def test_interaction_of_planted_functions(phantom):
    """Each is read at its own layer: another's block changes nothing, both change what the own one does."""
    answered = {f: answered_of(phantom, f, 3) for f in ("emotion", "ocr", "count")}
    blocks = {f: [PLANTED[f]] for f in answered}
    table = interaction(sweeper_of(phantom), answered, blocks)
    assert {f: set(row) for f, row in table.items()} == {f: set(blocks) - {f} for f in blocks}
    for f, row in table.items():
        for cell in row.values():
            assert cell == {"own": 1.0, "other": 0.0, "both": 1.0, "pairs": 3}, f
    assert interaction(sweeper_of(phantom), answered, {"ocr": [10]}) == {}


# --- bad pairs -------------------------------------------------------------------------------------


def with_line(loaded: LoadedPair, line: int, **changes) -> LoadedPair:
    return LoadedPair(
        line, type(loaded.pair)(**{**vars(loaded.pair), **changes.pop("pair", {})}),
        changes.get("image_a", loaded.image_a), changes.get("image_b", loaded.image_b),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> LoadedPair:
    return probe_set({"emotion": 1}, 3).pairs["emotion"][0]


def test_unequal_grids_are_refused_by_name(phantom, pair):
    uneven = with_line(pair, 7, image_b=Image.new("RGB", (64, 48)))
    with pytest.raises(DataError) as caught:
        list(sweeper_of(phantom).answered([pair, uneven]))
    grids = [phantom.prompt("?", [image]).grids for image in (uneven.image_a, uneven.image_b)]
    assert grids[0] != grids[1]
    wanted = f"emotion: line 7: the images get unequal grids, {grids[0]} and {grids[1]}"
    assert caught.value.message.startswith(wanted) and caught.value.fix


@pytest.mark.parametrize("error", [ConfigError("no such form", "do this"), DataError("bad", "do that")])
def test_a_pair_that_the_model_cannot_take_names_its_line_and_keeps_the_kind_of_error(
    phantom, pair, monkeypatch, error
):
    def refuse(question, images, videos):
        raise error

    monkeypatch.setattr(phantom, "prompt", refuse)
    with pytest.raises(type(error)) as caught:
        list(sweeper_of(phantom).answered([with_line(pair, 3)]))
    assert caught.value.message == f"emotion: line 3: {error.message}" and caught.value.fix == error.fix


def test_what_a_processor_says_itself_becomes_one_line(phantom, pair, monkeypatch):
    def refuse(question, images, videos):
        raise ValueError("aspect ratio must be smaller than 200\nTraceback of no use")

    monkeypatch.setattr(phantom, "prompt", refuse)
    with pytest.raises(DataError, match=r"emotion: line 3: .* aspect ratio must be smaller than 200$"):
        list(sweeper_of(phantom).answered([with_line(pair, 3)]))
