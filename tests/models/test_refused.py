"""Models on which interventions mean nothing are refused when they are loaded, in one sentence that names
what is missing. Without weights: nothing may be computed before."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny_models import tiny_vlm
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, drop, read_out
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import FAMILIES

OBSTACLES = {
    "qwen3_5": "3 of 4 decoder layers have linear_attn in place of self-attention",
    "lfm3_vl": "4 of 6 decoder layers have conv in place of self-attention",
    "mistral_large4": "decoder layers pick the tokens that they read by an indexer",
    "inkling_mm_model": "attention of InklingTextModel does not go through transformers' attention interface",
    "t5gemma2": "the decoder reads an encoder's output in place of the image",
    "idefics": "names no image token",
}
TEXT = {
    "qwen3_5": {"num_hidden_layers": 4},
    "lfm3_vl": {"num_hidden_layers": 6},
    "mistral_large4": {"num_hidden_layers": 2},
    "inkling_mm_model": {"num_hidden_layers": 2},
}


def skeleton(model_type: str) -> VisionLanguageModel:
    text = {"text_config": TEXT[model_type]} if model_type in TEXT else {}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**text))
    return VisionLanguageModel(model, tiny_vlm("llava").processor, "skeleton")


@pytest.mark.parametrize("model_type", OBSTACLES)
def test_an_obstacle_is_named_before_anything_runs(model_type, monkeypatch):
    monkeypatch.delitem(FAMILIES, model_type, raising=False)  # as if nobody had registered it
    with pytest.raises(ConfigError) as e:
        skeleton(model_type)
    assert OBSTACLES[model_type] in e.value.message
    assert model_type in e.value.message and ". " not in e.value.message


def test_an_attention_that_goes_its_own_way_is_refused(monkeypatch):
    """Its edits would seem to have no effect."""
    vlm = tiny_vlm("llava")
    row = Row(vlm.prompt("three cats ?", [picture(0)]), (5, 7), drop([2]))
    own = vlm.attention(2)
    monkeypatch.setattr(
        own, "forward", lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    )
    with pytest.raises(ConfigError, match="attention of layer 2 does not go through transformers'"):
        list(read_out(vlm, [row], "reference"))


def test_a_model_that_makes_all_logits_is_read_at_the_same_places(monkeypatch):
    vlm = tiny_vlm("llava")
    row = Row(vlm.prompt("three cats ?", [picture(0)]), (5, 7), drop([2]))
    (wanted,) = read_out(vlm, [row], "reference")
    forward = vlm.model.forward
    monkeypatch.setattr(vlm.model, "forward", lambda logits_to_keep, **inputs: forward(**inputs))
    (found,) = read_out(vlm, [row], "reference")
    assert found.predicted == wanted.predicted
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
