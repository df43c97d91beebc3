"""The built-in probes of real models: what varies inside a pair, and that the rest of the set is balanced."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from vfl_train.config import ProbesConfig
from vfl_train.errors import ConfigError, DiskError
from vfl_train.functions.builtin import canvas, pairs, probe_set
from vfl_train.functions.builtin.words import FIVE, SIX
from vfl_train.functions.check import check_probes
from vfl_train.functions.export import export_probes
from vfl_train.functions.matching import box, matches
from vfl_train.functions.probes import builtin_probe_set, load_probe_set, save_probe_set
from vfl_train.schemas import BUILTIN_FUNCTIONS

PAIRS = 100


@lru_cache(maxsize=2)  # a hundred pairs are 160 MB
def some(function, count=PAIRS, seed=0, box=None):
    return tuple(probe_set([function], count, seed, box).pairs[function])


def pixels(image):
    return np.asarray(image).astype(int)


def changed(loaded):
    """Which pixels differ between the two images, bool [height, width]."""
    return (pixels(loaded.image_a) != pixels(loaded.image_b)).any(axis=2)


def extent(mask):
    """(left, top, right, bottom) of the True pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def drawn(image):
    """Which pixels are not the ground, whose colour is that of the corner."""
    return (pixels(image) != pixels(image)[0, 0]).any(axis=2)


@pytest.mark.parametrize("function", BUILTIN_FUNCTIONS)
def test_a_hundred_pairs_of_equal_size_and_different_answers(function):
    found = some(function)
    assert len(found) == PAIRS
    for loaded in found:
        assert loaded.image_a.size == loaded.image_b.size == (448, 448)
        assert loaded.image_a.mode == loaded.image_b.mode == "RGB"
        pair = loaded.pair
        assert not matches(pair.answer_a, pair.answer_b, pair.match)
        assert not matches(pair.answer_b, pair.answer_a, pair.match)
        assert changed(loaded).any()
    assert len({p.image_a.tobytes() + p.image_b.tobytes() for p in found}) == PAIRS


@pytest.mark.parametrize("function", BUILTIN_FUNCTIONS)
def test_pairs_depend_on_seed_function_and_place_in_the_set_alone(function):
    again = probe_set(["ocr" if function == "count" else "count", function], 6, 0).pairs[function]
    for one, other in zip(again, some(function), strict=False):
        assert one.pair == other.pair
        assert one.image_a.tobytes() == other.image_a.tobytes()
        assert one.image_b.tobytes() == other.image_b.tobytes()
    other_seed = probe_set([function], 6, 1).pairs[function]
    assert all(a.image_a.tobytes() != b.image_a.tobytes() for a, b in zip(again, other_seed, strict=True))


def test_the_digest_covers_pixels_and_texts():
    one = probe_set(["grounding"], 2)
    assert one.sha256 == probe_set(["grounding"], 2).sha256
    assert one.sha256 != probe_set(["grounding"], 2, seed=1).sha256
    assert one.sha256 != probe_set(["grounding"], 2, size=224).sha256  # the same texts
    assert one.sha256 != probe_set(["grounding"], 2, box="pixels").sha256  # the same pixels


@pytest.mark.parametrize("function", BUILTIN_FUNCTIONS)
def test_every_image_has_a_donor_with_its_own_answer_and_one_with_another(function):
    """The profiler's nuisance and unrelated controls: another pair's image, same question."""
    answers = defaultdict(list)
    for number, loaded in enumerate(some(function)):
        answers[loaded.pair.question] += [(number, loaded.pair.answer_a), (number, loaded.pair.answer_b)]
    assert len(answers) <= 16  # few questions, so that pairs share them
    for entries in answers.values():
        for number, answer in entries:
            assert any(n != number and a == answer for n, a in entries)
            assert any(n != number and a != answer for n, a in entries)


@pytest.mark.parametrize("convention", pairs.BOXES)
def test_boxes_come_in_twos_with_equal_boxes_in_other_pictures(convention):
    found = some("grounding", 20, 0, convention)
    for one, twin in zip(found[::2], found[1::2], strict=True):
        texts = [(p.pair.question, p.pair.answer_a, p.pair.answer_b) for p in (one, twin)]
        assert texts[0] == texts[1]
        assert one.image_a.tobytes() != twin.image_a.tobytes()
    assert len({p.pair.answer_a for p in found}) == 10


@pytest.mark.parametrize(
    ("function", "answers", "share"),
    [("recognition", 2, 0.5), ("emotion", 5, 0.2), ("count", 6, 1 / 6), ("grounding", 4, 0.25)],
)
def test_answers_are_balanced(function, answers, share):
    found = Counter()
    first = Counter(p.pair.answer_a for p in some(function))
    for loaded in some(function):
        found += Counter([loaded.pair.answer_a, loaded.pair.answer_b])
    assert len(found) == answers
    for answer, number in found.items():
        assert abs(number / (2 * PAIRS) - share) < 0.06, answer
        assert abs(first[answer] / PAIRS - share) < 0.12, answer


def test_either_object_is_the_nearer_one_in_image_a():
    letters = Counter(p.pair.answer_a[0] for p in some("relation"))
    assert letters.keys() == {"A", "B"} and abs(letters["A"] - letters["B"]) <= 0.2 * PAIRS


def test_recognition_is_an_object_or_its_blank_ground():
    for loaded in some("recognition"):
        blank, full = (
            (loaded.image_b, loaded.image_a)
            if loaded.pair.answer_a == "Yes"
            else (loaded.image_a, loaded.image_b)
        )
        assert {loaded.pair.answer_a, loaded.pair.answer_b} == {"Yes", "No"}
        assert len(blank.getcolors()) == 1
        left, top, right, bottom = extent(changed(loaded))
        assert min(left, top) > 0 and max(right, bottom) < 448, "cut off"
        assert changed(loaded).sum() > 0.01 * 448**2
        assert pixels(full)[0, 0].tolist() == pixels(blank)[0, 0].tolist()


def test_ocr_pairs_differ_in_the_word_alone():
    for loaded in some("ocr", 50):
        a, b = loaded.pair.answer_a, loaded.pair.answer_b
        assert len(a) == len(b) and a[0] != b[0]
        box_a, box_b = extent(drawn(loaded.image_a)), extent(drawn(loaded.image_b))
        outside = changed(loaded)
        outside[min(box_a[1], box_b[1]) : max(box_a[3], box_b[3]), min(box_a[0], box_b[0]) : max(box_a[2], box_b[2])] = False  # fmt: skip # noqa: E501
        assert not outside.any()
        assert abs(box_a[0] - box_b[0]) <= 8, "both words start at the same place"
        # Same size: x-heights, ascenders and descenders differ by word, whole lines do not.
        assert 0.5 < (box_a[3] - box_a[1]) / (box_b[3] - box_b[1]) < 2
        for left, top, right, bottom in (box_a, box_b):
            assert min(left, top) > 0 and max(right, bottom) < 448, "cut off"
        inks = [
            pixels(i)[drawn(i)].reshape(-1, 3).sum(axis=1).min() for i in (loaded.image_a, loaded.image_b)
        ]
        assert inks[0] == inks[1], "one colour"


def test_both_words_of_an_ocr_pair_are_written_alike(monkeypatch):
    written = []
    monkeypatch.setattr(
        canvas.Canvas, "text", lambda self, x, y, text, *rest: written.append((text, x, y, *rest))
    )
    for seed, case in enumerate(pairs.ocr_cases(np.random.default_rng(0))[:20]):
        pairs.ocr(case, np.random.default_rng(seed), 448)
        a, b = written[-2:]
        assert (a[0], b[0]) == case and a[1:] == b[1:]


def test_words_are_distinct_and_of_one_length():
    assert {len(w) for w in FIVE} == {5} and {len(w) for w in SIX} == {6}
    assert len({*FIVE, *SIX}) == len(FIVE) + len(SIX) > 250
    assert all(w.isascii() and w.isalpha() and w.islower() for w in (*FIVE, *SIX))


def stood(monkeypatch, case, seed):
    """What `count` stands on the ground in images a and b, as lists of (kind, place, colour)."""
    calls = []
    monkeypatch.setattr(
        pairs, "stand", lambda pen, kind, color, ground: calls.append((kind, pen._left, pen._top, color))
    )
    pairs.count(case, np.random.default_rng(seed), 448)
    return calls


def test_count_pairs_differ_in_one_category_alone(monkeypatch):
    for seed, case in enumerate(pairs.count_cases(np.random.default_rng(0))):
        category, in_a, in_b = case
        calls = stood(monkeypatch, case, seed)
        others = sum(kind != category for kind, *_ in calls) // 2
        a, b = calls[: in_a + others], calls[in_a + others :]
        assert (sum(c[0] == category for c in a), sum(c[0] == category for c in b)) == (in_a, in_b)
        assert [c for c in a if c[0] != category] == [c for c in b if c[0] != category]
        more, fewer = (a, b) if in_a > in_b else (b, a)
        assert set(fewer) < set(more)
        assert len({c[0] for c in a}) == len(pairs.CATEGORIES)
        assert len({c[1:3] for c in more}) == len(more)


def test_solids_of_a_count_do_not_touch():
    """Each stands inside its own cell of the 4 x 4 grid, shadow included."""
    for loaded in some("count", 20):
        for image in (loaded.image_a, loaded.image_b):
            mask = drawn(image)
            for edge in (0, 112, 224, 336):
                assert not mask[edge].any() and not mask[:, edge].any()


def test_count_answers_are_the_solids_in_the_picture():
    """Cells of the grid that something stands in: both images together with the difference of the answers."""
    for loaded in some("count", 20):
        cells = [
            sum(
                drawn(i)[y : y + 112, x : x + 112].any()
                for y in range(0, 448, 112)
                for x in range(0, 448, 112)
            )
            for i in (loaded.image_a, loaded.image_b)
        ]
        assert cells[0] - cells[1] == int(loaded.pair.answer_a) - int(loaded.pair.answer_b)


def test_grounding_moves_the_object_and_nothing_else():
    for loaded in some("grounding"):
        crops, places = [], []
        for image, answer in ((loaded.image_a, loaded.pair.answer_a), (loaded.image_b, loaded.pair.answer_b)):
            left, top, right, bottom = extent(drawn(image))
            crops.append(pixels(image)[top:bottom, left:right])
            vertical = "top" if bottom < 224 else "bottom" if top > 224 else "?"
            horizontal = "left" if right < 224 else "right" if left > 224 else "?"
            places.append(f"{vertical} {horizontal}")
            assert answer.endswith(places[-1])
        assert places[0] != places[1]
        assert crops[0].shape == crops[1].shape
        assert np.abs(crops[0] - crops[1]).max() <= 3


@pytest.mark.parametrize(("convention", "scale"), [("pixels", 1.0), ("relative-1000", 448 / 1000)])
def test_grounding_boxes_hold_the_object(convention, scale):
    for loaded in some("grounding", 20, 0, convention):
        assert loaded.pair.match == "iou"
        for image, answer in ((loaded.image_a, loaded.pair.answer_a), (loaded.image_b, loaded.pair.answer_b)):
            seen = ",".join(str(v / scale) for v in extent(drawn(image)))
            assert matches(seen, answer, "iou")
            assert matches(f'{{"bbox_2d": [{seen}], "label": "it"}}', answer, "iou")
    first, second = ([p.image_a.tobytes() for p in some("grounding", 20, 0, box)] for box in pairs.BOXES)
    assert first == second  # the conventions differ in their words alone
    assert all(box(p.pair.answer_a) is None for p in some("grounding", 20))
    with pytest.raises(ValueError, match="percent"):
        probe_set(["grounding"], 2, box="percent")


def test_emotion_changes_the_inside_of_the_face_alone():
    for loaded in some("emotion", 40):
        left, top, right, bottom = extent(drawn(loaded.image_a))
        x0, y0, x1, y1 = extent(changed(loaded))
        assert left <= x0 and x1 <= right and top < y0 and y1 < bottom


def test_relation_swaps_which_object_is_in_front():
    """The larger patch of an object's hue is the nearer one."""
    hues = {name: np.array(color) for name, color in canvas.COLORS.items()}
    for loaded in some("relation", 40):
        names = [line[3:] for line in loaded.pair.question.split("\n")[1:3]]
        for image, answer in ((loaded.image_a, loaded.pair.answer_a), (loaded.image_b, loaded.pair.answer_b)):
            areas = [like(image, hues[name.split()[1]]).sum() for name in names]
            assert min(areas) > 100, "hidden"
            assert answer[3:] == names[int(np.argmax(areas))]
            assert areas[0] > 1.5 * areas[1] or areas[1] > 1.5 * areas[0]


def like(image, color):
    """Saturated pixels with the hue of `color`, bool [height, width]."""
    values = pixels(image).astype(float)
    values -= values.mean(axis=2, keepdims=True)
    wanted = color - color.mean()
    length = np.linalg.norm(values, axis=2)
    return (values @ wanted > 0.97 * length * np.linalg.norm(wanted)) & (length > 40)


@pytest.mark.parametrize("function", ["emotion", "grounding", "relation"])
def test_choices_are_given_by_letter_or_words(function):
    for loaded in some(function, 20):
        assert loaded.pair.match == "choice"
        question, *options, instruction = loaded.pair.question.split("\n")
        assert question.endswith("?") and "letter" in instruction
        for answer, other in (
            (loaded.pair.answer_a, loaded.pair.answer_b),
            (loaded.pair.answer_b, loaded.pair.answer_a),
        ):
            assert answer in options
            letter, words = answer.split(". ")
            for said in (letter, f"{letter}.", f"({letter})", answer, words, words.capitalize() + "."):
                assert matches(said, answer, "choice"), said
                assert not matches(said, other, "choice"), said


def test_phantoms_keep_their_own_world():
    own = builtin_probe_set(("ocr",), 2, 0, world="phantom")
    assert own.name == "phantom" and own.pairs["ocr"][0].image_a.size == (64, 64)
    others = builtin_probe_set((), 2, 0, box="pixels")
    assert others.name == "builtin-1" and tuple(others.pairs) == BUILTIN_FUNCTIONS
    assert others.pairs["grounding"][0].pair.match == "iou"
    for world in ("phantom", None):
        with pytest.raises(ConfigError, match="smell"):
            builtin_probe_set(("smell",), 2, 0, world=world)


def test_a_saved_set_is_read_back_whole(tmp_path):
    probes = probe_set(pairs=2)
    save_probe_set(probes, tmp_path)
    again = load_probe_set(tmp_path)
    for function, saved in probes.pairs.items():
        for one, other in zip(saved, again.pairs[function], strict=True):
            assert (one.line, one.pair) == (other.line, other.pair)
            assert one.image_a.tobytes() == other.image_a.tobytes()
            assert one.image_b.tobytes() == other.image_b.tobytes()


def test_export_writes_a_folder_that_check_accepts(tmp_path, capsys):
    config = ProbesConfig(action="export", folder=tmp_path / "p", functions=("ocr", "count"), pairs=3, seed=4)
    export_probes(config)
    assert "6 pairs of ocr, count" in capsys.readouterr().out
    check_probes(ProbesConfig(action="check", folder=tmp_path / "p"))
    assert "6 pairs = 6 usable + 0 unusable" in capsys.readouterr().out
    wanted = probe_set(["ocr", "count"], 3, 4).pairs
    read = load_probe_set(tmp_path / "p").pairs
    assert [[p.pair for p in found] for found in read.values()] == [
        [p.pair for p in f] for f in wanted.values()
    ]
    with pytest.raises(ConfigError, match="no empty folder"):
        export_probes(config)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no empty folder"):
        export_probes(replace(config, folder=tmp_path / "file"))
    with pytest.raises(DiskError, match="cannot write"):
        export_probes(replace(config, folder=tmp_path / "file" / "p"))


def test_a_missing_font_is_named():
    with pytest.raises(ConfigError, match="NoSuchFace"):
        canvas.font_of("NoSuchFace", 20)
