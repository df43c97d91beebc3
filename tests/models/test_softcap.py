"""PaliGemma 2 has a Gemma 2 decoder, which bends its attention scores below a cap: no SDPA computes that, the
reference path does."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny.paligemma import build
from tiny_models import TEXT, louder
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, drop, knockout, read_out, swap, uniform
from vfl_train.models import VisionLanguageModel
from vfl_train.models.generation import generate

CAP = 2.0  # released: 50; low enough to bend what a tiny model scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    one, processor = build()
    text = {
        key: getattr(one.config.text_config, key) for key in ("vocab_size", "eos_token_id", "pad_token_id")
    }
    config = PaliGemmaConfig(
        text_config=Gemma2Config(
            **TEXT, **text, head_dim=16, query_pre_attn_scalar=16, sliding_window=256,
            attn_logit_softcapping=CAP,
        ),
        vision_config=one.config.vision_config, projection_dim=64, tie_word_embeddings=False,
        image_token_index=one.config.image_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("paligemma2")
    louder(PaliGemmaForConditionalGeneration(config)).save_pretrained(where)
    processor.save_pretrained(where)
    return where


def test_the_reference_path_computes_what_the_model_does(folder):
    """Loaded as any command loads it: it generates with transformers' own eager attention."""
    vlm = VisionLanguageModel.load(str(folder), device="cpu")
    host, donor = (vlm.prompt("three cats ?", [picture(i)]) for i in range(2))
    (own,) = generate(vlm, [donor], 5)
    every = range(vlm.num_layers)
    branches = [(), drop([1]), swap(every, "d"), knockout([1])]
    rows = [Row(donor, own.tokens), *(Row(host, own.tokens, b, {"d": donor}) for b in branches)]
    for path in ("reference", "engine"):
        wanted, base, dropped, swapped, out = read_out(vlm, rows, path)
        assert wanted.holds and swapped.logprobs == pytest.approx(wanted.logprobs, abs=2e-5)
        assert min(abs(one.logprobs[0] - base.logprobs[0]) for one in (dropped, swapped, out)) > 1e-3


def test_the_cap_is_felt(folder):
    vlm = VisionLanguageModel.load(str(folder), device="cpu")
    row = Row(vlm.prompt("three cats ?", [picture(0)]), (5, 7))
    (capped,) = read_out(vlm, [row], "reference")
    for layer in range(vlm.num_layers):
        vlm.attention(layer).attn_logit_softcapping = None
    (free,) = read_out(vlm, [row], "reference")
    assert abs(capped.logprobs[0] - free.logprobs[0]) > 1e-3


def test_uniform_attention_below_a_cap(folder):
    """Scores of zero stay zero; the kernel that the engine would use knows no cap and says so."""
    vlm = VisionLanguageModel.load(str(folder), device="cpu")
    row = Row(vlm.prompt("three cats ?", [picture(0)]), (5, 7), uniform([1]))
    assert list(read_out(vlm, [row], "reference"))
    with pytest.raises(ConfigError, match="soft-capping"):
        list(read_out(vlm, [row], "engine"))
