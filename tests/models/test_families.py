"""What every supported family must keep to. One family alone: `pytest tests/models -k NAME`. A new one is a
file in tests/support/tiny and a line in vfl_train/models/families (see its README)."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch
from family_cases import VARIANT_REASONS
from pictures import picture
from PIL import Image
from tiny_models import SUPPORTED, VARIANTS, model_type_of, tiny_vlm

from vfl_train.config import ProfileConfig
from vfl_train.data.rows import Message, Text, user_message
from vfl_train.errors import ConfigError
from vfl_train.functions.probes import LoadedPair, ProbeSet
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import FAMILIES, Family, family_of
from vfl_train.models.generation import generate
from vfl_train.profiling import sweep
from vfl_train.profiling.measure import measure
from vfl_train.schemas import ProbePair
from vfl_train.training.plan import build_plan, choose_layers
from vfl_train.training.skeleton import load_skeleton

QUESTION = "three cats ?"
CAP = 6  # tokens of an answer in a profile
SIZES = ((32, 32), (64, 32), (32, 64), (64, 64), (64, 48))  # width, height


REFUSED = [name for name, family in FAMILIES.items() if family.refused is not None]


@pytest.fixture(params=SUPPORTED)
def vlm(request):
    return tiny_vlm(request.param)


@pytest.fixture(params=["reference", "engine"])
def path(request):
    return request.param


def plain(color: str) -> Image.Image:
    return Image.new("RGB", (32, 32), color)


def several(vlm: VisionLanguageModel) -> int:
    """The most images of a prompt here."""
    return 2 if vlm.family.several_images else 1


def same(one, other) -> None:
    """Equal log-probabilities, to fp32 rounding."""
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=1e-5)


# --- the registry -----------------------------------------------------------------------------------


def test_every_registered_family_has_a_tiny_model_or_a_refusal():
    assert set(FAMILIES) - set(REFUSED) == {model_type_of(name) for name in SUPPORTED}
    assert family_of("nobody_knows_it") == Family()


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_tiny_model_is_of_the_family_it_is_named_after(name):
    assert tiny_vlm(name).model_type == model_type_of(name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_is_refused_in_its_one_sentence(name, tmp_path):
    """Before anything of it is read but its configuration."""
    sentence = FAMILIES[name].refused
    assert "\n" not in sentence and ". " not in sentence and not sentence.endswith(".")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}), "utf-8")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError) as e:
        VisionLanguageModel.load(str(tmp_path))
    assert e.value.message == f"{name} models are not supported: {sentence}"


def test_boxes_are_written_as_each_family_was_trained_to():
    boxes = {name: family.box for name, family in FAMILIES.items() if family.box is not None}
    assert boxes == {
        "qwen2_vl": "relative-1000", "qwen2_5_vl": "pixels", "qwen3_vl": "relative-1000",
        "internvl": "relative-1000", "qwen3_vl_moe": "relative-1000", "glm4v": "relative-1000",
    }  # fmt: skip


# --- modules ----------------------------------------------------------------------------------------


def test_named_modules_are_in_every_layer(vlm):
    for index, layer in enumerate(vlm.layers):
        assert hasattr(layer, vlm.attention_name(index)) and hasattr(layer, vlm.family.mlp)
        assert vlm.attention(index).layer_idx == index


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_plan_adapts_the_linears_of_its_layers_alone(folder_of, name):
    """All linear modules of these layers' attention and MLP; among experts those of the attention."""
    skeleton = load_skeleton(str(folder_of(name)))
    plan = build_plan(choose_layers(skeleton.info, layers="1-2"), skeleton, lora_r=4)
    linears = {n for n, m in skeleton.base.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = set()
    for k in (1, 2):
        layer = skeleton.layer_names[k]
        moe = any("experts" in n for n, _ in skeleton.layers[k].named_modules())
        attention = skeleton.attention_name(k)
        parts = [attention] if moe else [attention, skeleton.family.mlp]
        inside |= {n for n in linears if n.startswith(tuple(f"{layer}.{part}." for part in parts))}
    assert set(plan.module_names) == inside and len(inside) >= 2 * 3
    assert sum(group["linears"] for group in plan.skipped) == len(linears - inside)


# --- prompts ----------------------------------------------------------------------------------------


def test_every_image_is_one_span_from_first_to_last_placeholder(vlm):
    for count in range(several(vlm) + 1):
        prompt = vlm.prompt(QUESTION, [picture(i, SIZES[i + 2]) for i in range(count)])
        ids = prompt.inputs["input_ids"][0]
        at = (ids == vlm.image_token_id).nonzero()[:, 0].tolist()
        assert len(prompt.spans) == len(prompt.grids) == count
        if vlm.family.cross_attention is not None:  # the images are not among the tokens
            assert prompt.spans == ((0, 0),) * count and len(at) == count
            continue
        assert sum(sum(a <= i < b for i in at) for a, b in prompt.spans) == len(at)
        assert all(a in at and b - 1 in at for a, b in prompt.spans)
        assert all(one[1] <= two[0] for one, two in zip(prompt.spans, prompt.spans[1:], strict=False))


def test_equal_grids_are_those_of_equal_prompts(vlm):
    """Images of one size may be swapped; of equal grids all that the model gets beside pixels is equal."""
    prompts = [vlm.prompt(QUESTION, [picture(i, size)]) for size in SIZES for i in range(2)]
    for one, other in zip(prompts[::2], prompts[1::2], strict=True):
        assert one.grids == other.grids
    for one in prompts:
        for other in prompts:
            if one.grids == other.grids:
                assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
                assert one.spans == other.spans


def test_a_conversation_is_located_like_a_prompt(vlm):
    """The images of a training row are found as those of a question; only the answer and what closes it is
    supervised."""
    images = [plain("red"), plain("blue")][: several(vlm)]
    messages = [user_message(QUESTION, len(images)), Message("assistant", (Text("12 dogs"),))]
    encoded = vlm.encoder.encode(messages, images)
    prompt = vlm.located(encoded.inputs, len(images), encoded.places)
    asked = vlm.prompt(QUESTION, images)
    assert (prompt.spans, prompt.grids) == (asked.spans, asked.grids)
    assert not encoded.answer_mask[: prompt.spans[-1][1]].any()
    supervised = encoded.inputs["input_ids"][0, encoded.answer_mask].tolist()
    assert vlm.decode(supervised) == "12 dogs"
    assert supervised[-1] in {*vlm.eos_token_ids, vlm.processor.tokenizer.eos_token_id}


# --- interventions ----------------------------------------------------------------------------------


def test_forced_own_output_holds(vlm, path):
    """Generation with a cache and teacher forcing without one agree on what the model says."""
    prompts = [vlm.prompt(QUESTION, [plain(c)]) for c in ("red", "blue", "white")]
    own = generate(vlm, prompts, 5)
    rows = [Row(p, g.tokens) for p, g in zip(prompts, own, strict=True)]
    assert all(r.holds for r in read_out(vlm, rows, path))


def test_a_swap_everywhere_equals_the_donor(vlm, path):
    """Text that reads the donor's image at every layer says what it says of the donor."""
    # Not black and white: Gemma 4 12B normalises each patch of pixels, and all greys become the same.
    host, donor = (vlm.prompt(QUESTION, [plain(c)]) for c in ("red", "white"))
    branch = swap(range(vlm.num_layers), "donor")
    rows = [Row(host, (5, 7), branch, {"donor": donor}), Row(donor, (5, 7)), Row(host, (5, 7))]
    swapped, wanted, own = read_out(vlm, rows, path)
    same(swapped, wanted)
    assert abs(own.logprobs[0] - wanted.logprobs[0]) > 1e-3, "the images make no difference: it shows nothing"


def test_a_drop_everywhere_forgets_the_image(vlm, path):
    blind = [
        Row(vlm.prompt(QUESTION, [plain(c)]), (5, 7), drop(range(vlm.num_layers))) for c in ("red", "blue")
    ]
    same(*read_out(vlm, blind, path))


def test_prompts_with_and_without_images_share_a_batch(vlm, path):
    prompts = [vlm.prompt(QUESTION, [plain("red")] * count) for count in (1, 0, several(vlm))]
    rows = [Row(p, (5, 7), branch) for p in prompts for branch in ((), drop([1]))]
    together = read_out(vlm, rows, path)
    alone = [next(read_out(vlm, [row], path)) for row in rows]
    for one, other in zip(together, alone, strict=True):
        same(one, other)
    assert alone[2].logprobs == alone[3].logprobs  # nothing to drop


# --- a profile --------------------------------------------------------------------------------------


def answered_pairs(vlm: VisionLanguageModel, count: int) -> list[LoadedPair]:
    """Pairs whose right answers are what the model says; those of which it says two things first."""
    colors = ("black", "white", "red", "lime", "blue", "yellow")
    questions = (QUESTION, "12 dogs ?", "what text is written here ?")
    asked = [(question, plain(color)) for question in questions for color in colors]
    said = [g.text for g in generate(vlm, [vlm.prompt(question, [image]) for question, image in asked], CAP)]
    found = []
    for (one, a), (other, b) in combinations(zip(asked, said, strict=True), 2):
        pair = ProbePair("ocr", "a", "b", one[0], a, b)
        if one[0] == other[0] and a and b:
            found.append(LoadedPair(len(found), pair, one[1], other[1]))
    return sorted(found, key=lambda loaded: loaded.pair.answer_a == loaded.pair.answer_b)[:count]


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in VARIANTS])
def test_a_profile_runs_and_names_its_path(folder_of, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "MAX_ANSWER_TOKENS", CAP)
    vlm = VisionLanguageModel.load(str(folder_of(name)), device="cpu")
    pairs = answered_pairs(vlm, 2)
    config = ProfileConfig(model=name, output=tmp_path, functions=("ocr",), pairs=2)
    found = measure(vlm, ProbeSet("own", "0", {"ocr": pairs}), config)
    function = found.functions["ocr"]
    assert (function.pairs, function.pairs_answered) == (2, 2)
    assert len(function.change_rate) == len(function.flip_rate) == vlm.num_layers
    assert found.path == ("reference" if VARIANT_REASONS.get(name, vlm.family.reference_only) else "engine")
