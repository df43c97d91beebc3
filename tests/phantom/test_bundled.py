"""The bundled models: loadable like any other, right on unseen scenes, and planted where they say.

The full bars (200 questions a function) are held by scripts/check_phantom.py; here a sample of them, with
three probe seeds for the planted layers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from vfl_train.evaluation.run import probe_questions, score
from vfl_train.models import VisionLanguageModel, resolve_name
from vfl_train.phantom.architecture import PLANTED
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling import statistics
from vfl_train.profiling.sweep import Sweeper

FAR = 2  # layers from the planted one at which a swap must change next to nothing


@pytest.fixture(scope="module")
def phantom() -> VisionLanguageModel:
    return VisionLanguageModel.load("phantom")


@pytest.mark.parametrize("name", ["phantom", "phantom-unplanted"])
def test_loads_with_plain_transformers_and_answers_unseen_scenes(name):
    folder, _ = resolve_name(name)
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
    assert AutoProcessor.from_pretrained(folder).chat_template
    vlm = VisionLanguageModel.load(name)
    probes = probe_set(dict.fromkeys(PLANTED, 20), seed=31)
    scores = score(vlm, probe_questions(probes), max_new_tokens=8, with_base=False)
    assert {n: s.n for n, s in scores.items()} == dict.fromkeys(PLANTED, 40)
    assert all(s.accuracy >= 0.9 for s in scores.values()), scores


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_function_is_read_at_its_planted_layer_and_nowhere_far(phantom, seed):
    for name, pairs in probe_set(dict.fromkeys(PLANTED, 6), seed=seed).pairs.items():
        sweeper = Sweeper(phantom, "text", "reference", 8192)
        assert sweeper.answered(pairs) >= 4
        k = PLANTED[name]
        far = [i for i in range(phantom.num_layers) if abs(i - k) >= FAR]
        (flipped,) = sweeper.flipped([[k]], "")
        assert statistics.rate(flipped) >= 0.9, name
        branches = sweeper.single_layer_branches("swap")
        assert all(statistics.rate(c) <= 0.1 for c in sweeper.changed([branches[i] for i in far], "")), name


def test_both_models_together_are_small_and_say_how_they_were_trained():
    folders = [Path(resolve_name(n)[0]) for n in ("phantom", "phantom-unplanted")]
    total = sum(f.stat().st_size for folder in folders for f in folder.iterdir())
    assert total <= 24 * 2**20
    planted, unplanted = (json.loads((f / "training.json").read_text()) for f in folders)
    assert planted["planted"] == PLANTED
    assert unplanted["planted"] is None
    assert {**planted["recipe"], "planted": False} == unplanted["recipe"]
