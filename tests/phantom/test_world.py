"""The world: answers that are right by construction, minimal pairs that are minimal."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from vfl_train.phantom import world
from vfl_train.phantom.datasets import POOL, probe_set, write_pool
from vfl_train.phantom.digits import handwritten_digits


@pytest.mark.parametrize("source", ["fonts", "digits"])
@pytest.mark.parametrize("function", world.FUNCTIONS)
def test_minimal_pairs_differ_in_their_function_only(function, source):
    if source == "digits" and function == "recognition":
        pytest.skip("handwritten scenes have one kind of object")
    for a, b in world.minimal_pairs(function, 20, seed=5, text_source=source):
        for other in world.FUNCTIONS:
            assert (world.answer(a, other) == world.answer(b, other)) == (other != function), other
        changed = {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}
        allowed = {
            "recognition": {"kind"}, "emotion": {"mood"}, "count": {"objects"}, "grounding": {"star"},
            "relation": {"star", "heart"}, "ocr": {"text"},
        }[function]  # fmt: skip
        assert changed <= allowed
        assert not np.array_equal(world.draw(a), world.draw(b))


def test_pairs_come_with_same_answer_partners():
    for function in world.FUNCTIONS:
        pairs = list(world.minimal_pairs(function, 10, seed=1))
        assert len(pairs) == 10
        for (a, b), (c, d) in zip(pairs[::2], pairs[1::2], strict=True):
            assert world.answer(a, function) == world.answer(c, function)
            assert world.answer(b, function) == world.answer(d, function)
            assert not np.array_equal(world.draw(a), world.draw(c))


def test_scenes_are_seeded_and_nothing_overlaps():
    one, two = (world.sample_scene(np.random.default_rng(3)) for _ in range(2))
    assert one == two
    assert np.array_equal(world.draw(one), world.draw(two))
    rng = np.random.default_rng(0)
    for _ in range(200):
        s = world.sample_scene(rng)
        cells = [t.cell for t in (*s.objects, s.star, s.heart, s.face)]
        assert len(set(cells)) == len(cells)
        assert 1 <= len(s.objects) <= 6


def test_every_word_is_in_the_vocabulary():
    words = set(world.vocabulary())
    rng = np.random.default_rng(0)
    for source in ("fonts", "digits"):
        for _ in range(50):
            s = world.sample_scene(rng, source)
            assert all(w in words for f in world.FUNCTIONS for w in world.answer(s, f).split())
    assert all(w in words for pair in world.LANGUAGE for text in pair for w in text.split())


def test_handwritten_halves_are_disjoint_and_complete():
    train, test = handwritten_digits("train"), handwritten_digits("test")
    assert sum(len(x) for x in (*train, *test)) == 1797
    assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(train, test, strict=True))
    with pytest.raises(ValueError, match="split"):
        handwritten_digits("all")


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    theirs = datasets.load_digits()
    ours = np.concatenate(handwritten_digits("train")).astype(int)
    expected = np.minimum(theirs.images.astype(int) * 16, 255)
    rows = {x.tobytes() for x in expected}
    assert all(x.tobytes() in rows for x in ours)


def test_pool_has_the_shares_it_names_and_no_labels(tmp_path):
    import json

    path = write_pool(tmp_path, 200, seed=0)
    rows, truth = json.loads(path.read_text()), json.loads((tmp_path / "truth.json").read_text())
    assert len(rows) == len(truth) == sum(round(200 * s) for s in POOL.values())
    assert all(set(row) <= {"id", "image", "conversations"} for row in rows)
    for kind, share in POOL.items():
        assert list(truth.values()).count(kind) == round(200 * share)


def test_probe_sets_are_repeatable_and_unseen_in_training():
    one, two = probe_set({"ocr": 4}, 0), probe_set({"ocr": 4}, 0)
    assert one.sha256 == two.sha256 != probe_set({"ocr": 4}, 1).sha256
