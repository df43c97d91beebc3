"""Knockout against the planted interfering layer: found, recovered, and nothing found where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from planted_interference import planted_phantom, script

from vfl_train.interventions import Row, knockout, read_out
from vfl_train.knockout.measure import Meter, forced
from vfl_train.models import VisionLanguageModel

DRAWS, PAIRS, SEED = 200, 20, 77
HARMED = script().FUNCTION
OTHERS = [name for name in script().BUILTIN_FUNCTIONS if name != HARMED]


@pytest.fixture(scope="module")
def vectors():
    """Function -> (answers, vectors) of the phantom with the planted layer, on unseen scenes."""
    return script().layer_vectors(planted_phantom(), PAIRS, SEED)


def accuracies(vectors, function: str) -> np.ndarray:
    return vectors[function][1].right.mean(0)


@pytest.mark.slow
def test_the_planted_layer_harms_one_function_and_no_other(vectors):
    layer = script().LAYER
    assert accuracies(vectors, HARMED)[0] <= 0.5
    assert accuracies(vectors, HARMED)[1 + layer] >= 0.95
    for name in OTHERS:
        assert accuracies(vectors, name)[[0, 1 + layer]].min() >= 0.95


@pytest.mark.slow
def test_without_the_layer_the_planted_model_is_the_untouched_one_without_it():
    """Why it provably harms: the change acts through this layer's attention alone."""
    planted, plain = planted_phantom(), VisionLanguageModel.load("phantom", device="cpu")
    questions, _ = script().labelled(plain, 1, SEED)
    for layer, same in ((script().LAYER, True), (0, False)):
        said = [
            [r.logprobs for r in read_out(vlm, [Row(*forced(vlm, q), knockout([layer])) for q in questions])]
            for vlm in (planted, plain)
        ]
        assert (said[0] == said[1]) == same


@pytest.mark.slow
def test_it_is_found_in_nine_of_ten_draws_of_the_shots(vectors):
    found = script().resampled(*vectors[HARMED], DRAWS)
    assert found.count(script().LAYER) >= 0.9 * DRAWS
    assert set(found) <= {script().LAYER, None}, "it abstains or is right"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_where_nothing_interferes_it_abstains(vectors, name):
    assert script().resampled(*vectors[name], DRAWS).count(None) >= 0.95 * DRAWS


@pytest.mark.slow
def test_on_the_untouched_phantom_it_abstains():
    untouched = script().layer_vectors(VisionLanguageModel.load("phantom", device="cpu"), PAIRS, SEED)
    for name, (answers, found) in untouched.items():
        assert script().resampled(answers, found, DRAWS).count(None) >= 0.95 * DRAWS, name


@pytest.mark.slow
def test_on_labels_that_nobody_can_know_it_abstains():
    """Of the harmed function, too: without its layer the labels of other scenes become likelier."""
    shuffled = script().unanswerable(planted_phantom(), PAIRS, SEED)
    for name, (answers, found) in shuffled.items():
        assert found.right[:, 0].mean() < 0.8, "the labels are right: the test shows nothing"
        assert script().resampled(answers, found, DRAWS).count(None) >= 0.95 * DRAWS, name


def test_both_paths_measure_the_same():
    vlm = planted_phantom()
    questions, _ = script().labelled(vlm, 1, SEED)
    questions, branches = questions[:4], [[knockout([k]) for k in (0, 2, 5)]] * 4
    ours, theirs = (Meter(vlm, 8, path).measure(questions, branches) for path in ("engine", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.right == b.right).all()
        np.testing.assert_allclose(a.logprob, b.logprob, atol=2e-5)


def test_right_is_what_eval_calls_right():
    """Of every sample and branch, also where the answer leaves the label, against plain generation."""
    from vfl_train.functions.matching import matches
    from vfl_train.interventions.standing import standing
    from vfl_train.models.generation import generate

    vlm = planted_phantom()
    questions, samples = script().labelled(vlm, 1, SEED)
    found = Meter(vlm, 8).measure(questions, [[knockout([0])]] * len(questions))
    prompts = [prompt for _, prompt, _ in samples]
    for column, branch in ((0, ()), (1, knockout([0]))):
        with standing(vlm, branch):
            said = generate(vlm, prompts, 8)
        expected = [matches(s.text, q.answer, q.match) for s, q in zip(said, questions, strict=True)]
        assert [bool(f.right[0, column]) for f in found] == expected
        assert not all(expected) and any(expected)
