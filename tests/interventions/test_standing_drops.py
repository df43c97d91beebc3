"""Standing drops: plain `generate` with a KV cache says what the cache-free reference path says."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny_models import LAYERS, tiny_vlm
from transformers import GenerationConfig

from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, drop, knockout, read_out, swap, uniform
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.standing import standing
from vfl_train.models.generation import generate

CAP = 5
QUESTION = "what text is written here ?"
WHEN = {"text": {}, "decode": {"phase": "decode"}, "from step 2": {"phase": "decode", "from_step": 2}}


@pytest.fixture(params=["qwen2_5_vl", "llava", "gemma3_short_window"])
def vlm(request):
    return tiny_vlm(request.param)


@pytest.fixture
def prompts(vlm):
    """Two prompts of two images each."""
    return [vlm.prompt(QUESTION, [picture(seed), picture(seed + 5)]) for seed in (0, 1)]


@pytest.mark.parametrize("when", WHEN)
def test_generate_says_what_the_cache_free_way_says(vlm, prompts, when):
    """Both prompts in one batch; one layer, all of them, one image only, and with a layer left out."""
    for branch in (
        drop([1], **WHEN[when]),
        drop(range(LAYERS), **WHEN[when]),
        drop(range(LAYERS), spans=[0], **WHEN[when]),
        drop([0, 3], spans=[1], **WHEN[when]) + knockout([2]),
    ):
        with standing(vlm, branch, prompts):
            cached = [found.tokens for found in generate(vlm, prompts, CAP)]
        cut = [c[: c.index(vlm.image_token_id) + 1] if vlm.image_token_id in c else c for c in cached]
        assert cut == generate_under(vlm, [Row(p, (), branch) for p in prompts], CAP, "reference")


@torch.no_grad()
@pytest.mark.parametrize("when", WHEN)
def test_every_step_has_the_references_numbers(vlm, prompts, when):
    """Equal tokens could be luck: log-probabilities after each step, a cache in use, twice over."""
    prompt, branch = prompts[0], drop(range(LAYERS), **WHEN[when])
    with standing(vlm, branch, [prompt]):
        for _ in range(2):
            config = GenerationConfig(
                max_new_tokens=CAP, do_sample=False, output_logits=True, return_dict_in_generate=True,
                pad_token_id=vlm.pad_token_id, suppress_tokens=[vlm.image_token_id],
            )  # fmt: skip
            out = vlm.model.generate(**prompt.inputs, generation_config=config)
    said = out.sequences[0, prompt.length :].tolist()
    ours = [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, said, strict=True)]
    found, plain = read_out(vlm, [Row(prompt, tuple(said), branch), Row(prompt, tuple(said))], "reference")
    assert ours == pytest.approx(found.logprobs, abs=3e-5)
    first = 2 if when == "from step 2" else 0
    if vlm.name_or_path != "tiny-gemma3_short_window":  # the sliding layers do not see the image anyway
        assert all(abs(a - b) > 1e-3 for a, b in zip(ours[first:], plain.logprobs[first:], strict=True))


def test_what_cannot_stand_is_refused(vlm, prompts):
    other = vlm.prompt("who ?", [picture(0)])
    refused = {
        "a swap cannot stand": (swap([1], "d"), prompts),
        "a drop cannot stand": (drop([1]), []),
        "beside uniform": (drop([1]) + uniform([2]), prompts),
        "of one length": (drop([1]), [prompts[0], other]),
        "image 2 is not": (drop([1], spans=[2]), prompts),
    }
    for message, (branch, given) in refused.items():
        with pytest.raises(ConfigError, match=message), standing(vlm, branch, given):
            pass
    with pytest.raises(ConfigError, match="1 rows run"), standing(vlm, drop([1]), prompts):
        generate(vlm, prompts[:1], 2)
    static = GenerationConfig(max_new_tokens=2, do_sample=False, cache_implementation="static")
    with pytest.raises(ConfigError, match="on this cache"), standing(vlm, drop([1]), prompts[:1]):
        vlm.model.generate(**prompts[0].inputs, generation_config=static)
    assert vlm.text_config._attn_implementation == "sdpa"
