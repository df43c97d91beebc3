"""The bundled models: loadable like any other, right on unseen scenes, and planted where they say.

The full bars (200 questions a function) are held by scripts/check_phantom.py; here a sample of them. That
the planted layers are found is tests/profiling/test_truth.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from vfl_train.evaluation.run import Asking, probe_questions, score
from vfl_train.models import VisionLanguageModel, resolve_name
from vfl_train.phantom.architecture import PLANTED
from vfl_train.phantom.datasets import probe_set


@pytest.mark.parametrize("name", ["phantom", "phantom-unplanted"])
def test_loads_with_plain_transformers_and_answers_unseen_scenes(name):
    folder, _ = resolve_name(name)
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
    assert AutoProcessor.from_pretrained(folder).chat_template
    vlm = VisionLanguageModel.load(name)
    probes = probe_set(dict.fromkeys(PLANTED, 20), seed=31)
    scores = score(vlm, probe_questions(probes), Asking(max_new_tokens=8))
    assert {n: s.n for n, s in scores.items()} == dict.fromkeys(PLANTED, 40)
    assert all(s.accuracy >= 0.9 for s in scores.values()), scores


def test_both_models_together_are_small_and_say_how_they_were_trained():
    folders = [Path(resolve_name(n)[0]) for n in ("phantom", "phantom-unplanted")]
    total = sum(f.stat().st_size for folder in folders for f in folder.iterdir())
    assert total <= 24 * 2**20
    planted, unplanted = (json.loads((f / "training.json").read_text()) for f in folders)
    assert planted["planted"] == PLANTED
    assert unplanted["planted"] is None
    assert {**planted["recipe"], "planted": False} == unplanted["recipe"]
