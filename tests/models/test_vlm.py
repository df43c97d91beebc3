"""VisionLanguageModel: what it says of models loaded from a folder, its generation, and what it refuses."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import templates
import torch
from pictures import picture
from PIL import Image
from processors import gemma3_processor
from tiny_models import FAMILIES, LAYERS, gemma3, tiny_vlm

from vfl_train.errors import ConfigError, HubError
from vfl_train.models import VisionLanguageModel, load_processor, resolve_name
from vfl_train.models.generation import generate

QUESTION = "what text is written here ?"


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request, folder_of):
    return VisionLanguageModel.load(str(folder_of(request.param)), device="cpu")


@pytest.fixture(scope="module")
def qwen(folder_of):
    return VisionLanguageModel.load(str(folder_of("qwen2_5_vl")), device="cpu")


# --- facts ----------------------------------------------------------------------------------------


def test_facts_of_a_loaded_folder(vlm, folder_of):
    folder = folder_of(vlm.model_type)
    assert (vlm.name_or_path, vlm.folder, vlm.revision) == (str(folder), folder, None)
    assert (vlm.num_layers, vlm.hidden_size, vlm.dtype) == (LAYERS, 64, "float32")
    assert vlm.device.type == "cpu" and not vlm.model.training
    assert vlm.info.model_type in FAMILIES


QWEN = ("<|image_pad|>", "<|endoftext|>", ("<|im_end|>",))
WORDS = {  # image placeholder, padding, end tokens
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "llava": ("<image>", "<pad>", ("</s>",)),
    "internvl": ("<IMG_CONTEXT>", "<|endoftext|>", ("<|im_end|>",)),
    "gemma3": ("<image_soft_token>", "<pad>", ("<eos>", "<end_of_turn>")),
}


def test_ids_are_the_tokenizers(vlm):
    image, pad, ends = WORDS[vlm.model_type]
    ids = vlm.processor.tokenizer.convert_tokens_to_ids
    assert (vlm.image_token_id, vlm.pad_token_id) == (ids(image), ids(pad))
    assert vlm.eos_token_ids == tuple(map(ids, ends))


def test_every_end_token_of_the_generation_config_counts(folder_of):
    vlm = VisionLanguageModel.load(str(folder_of("qwen2_5_vl")), device="cpu")
    vlm.base.generation_config.eos_token_id = [3, 5]
    assert vlm.eos_token_ids == (3, 5)


def test_layer_names_lead_to_the_decoder_layers(vlm):
    modules = dict(vlm.base.named_modules())
    assert [modules[name] for name in vlm.layer_names] == list(vlm.layers)


def test_linear_names_never_name_the_vision_tower(vlm):
    modules = dict(vlm.base.named_modules())
    for k in range(LAYERS):
        names = vlm.linear_names(k)
        assert len(names) == 7 and all(isinstance(modules[n], torch.nn.Linear) for n in names)
        assert all(n.startswith(vlm.layer_names[k] + ".") and "vision" not in n for n in names)


# --- spans ----------------------------------------------------------------------------------------


def test_spans_hold_exactly_the_image_tokens(vlm):
    tokens = 20 if vlm.model_type == "internvl" else 16  # 64 x 64 pixels: four tiles and a thumbnail
    for count in range(3):
        prompt = vlm.prompt(QUESTION, [picture(i, 64) for i in range(count)])
        ids = prompt.inputs["input_ids"][0].tolist()
        inside = [i for start, stop in prompt.spans for i in range(start, stop)]
        assert inside == [i for i, token in enumerate(ids) if token == vlm.image_token_id]
        assert len(prompt.spans) == len(prompt.grids) == count
        assert [stop - start for start, stop in prompt.spans] == [tokens] * count


def test_images_that_cannot_be_told_apart_are_refused(vlm):
    inputs = dict(vlm.prompt(QUESTION, [picture(0, 64)]).inputs)
    with pytest.raises(ConfigError, match="2 images but 1 runs"):
        vlm.located(inputs, 2)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_grids_tell_sizes_and_layouts_apart(family):
    vlm = tiny_vlm(family)
    wide, high = (vlm.prompt(QUESTION, [Image.new("RGB", size)]) for size in ((64, 32), (32, 64)))
    assert wide.spans == high.spans and wide.grids != high.grids
    small, large = (vlm.prompt(QUESTION, [picture(0, size)]) for size in (32, 64))
    assert small.grids != large.grids


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_sizes_do_not_matter_where_all_images_are_resized_alike(family):
    vlm = tiny_vlm(family)
    wide, square = (vlm.prompt(QUESTION, [Image.new("RGB", size)]) for size in ((64, 32), (32, 32)))
    assert wide.grids == square.grids


def test_an_image_in_pieces_is_one_span():
    """Pan and scan: the image and two crops of it, with words between."""
    model, _ = gemma3()
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    processor = gemma3_processor(**options)
    processor.images_kwargs = {**processor.images_kwargs, **options}  # as a checkpoint's configuration does
    vlm = VisionLanguageModel(model, processor, "tiny-gemma3")
    prompt = vlm.prompt(QUESTION, [Image.new("RGB", (64, 32)), picture(0, 64)])
    (start, stop), second = prompt.spans
    ids = prompt.inputs["input_ids"][0]
    assert int((ids[start:stop] == vlm.image_token_id).sum()) == 3 * 16 < stop - start
    assert second[1] - second[0] == 16 and second[0] > stop
    assert prompt.grids[0] != prompt.grids[1]
    assert prompt.grids[0] == vlm.prompt(QUESTION, [Image.new("RGB", (64, 32), "red")]).grids[0]


def test_images_side_by_side_are_told_apart(qwen):
    """Without a token between them, only the encoder knows where one ends."""
    qwen.processor.chat_template = templates.QWEN.replace("<|vision_start|>", "").replace(
        "<|vision_end|>", ""
    )
    try:
        prompt = qwen.prompt(QUESTION, [picture(0, 64), picture(1, 32)])
    finally:
        qwen.processor.chat_template = templates.QWEN
    (first, middle), (again, last) = prompt.spans
    assert (middle, middle - first, last - again) == (again, 16, 4)


# --- generation -----------------------------------------------------------------------------------


def test_batched_generation_equals_one_by_one(vlm):
    prompts = [vlm.prompt(QUESTION + " three" * (i % 2), [picture(i, 64)]) for i in range(5)]
    batched = generate(vlm, prompts, 6)
    assert [len(g.tokens) for g in batched]
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"batch_tokens": 1}):
        assert generate(vlm, prompts, 6, **options) == batched


def greedy(vlm, prompt, length: int) -> tuple[int, ...]:
    """Argmax of the raw logits, one plain forward a token."""
    tokens: list[int] = []
    for _ in range(length):
        inputs = dict(prompt.inputs)
        for key, value in prompt.inputs.items():
            if value.shape == prompt.inputs["input_ids"].shape:
                tail = torch.full((1, len(tokens)), int(key == "attention_mask"))
                inputs[key] = torch.cat([value, tail], dim=1)
        inputs["input_ids"][0, prompt.length :] = torch.tensor(tokens, dtype=torch.long)
        with torch.no_grad():
            tokens.append(int(vlm.model(**inputs).logits[0, -1].argmax()))
    return tuple(tokens)


def test_generation_is_the_argmax_of_raw_logits(vlm):
    """Whatever generation_config says of sampling, penalties and suppressed tokens; it is put back."""
    prompt = vlm.prompt(QUESTION, [picture(0, 64)])
    expected, own = greedy(vlm, prompt, 6), vlm.base.generation_config
    changed = {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "suppress_tokens": [expected[0]]}
    saved = {key: getattr(own, key) for key in changed}
    own.update(**changed)
    try:
        theirs = vlm.model.generate(**prompt.inputs, max_new_tokens=1)[0, -1]
        assert int(theirs) != expected[0], "the settings change nothing: the test shows nothing"
        (found,) = generate(vlm, [prompt], 6)
        assert found.tokens == expected and found.text == vlm.decode(expected)
        assert vlm.base.generation_config is own and own.repetition_penalty == 50.0
    finally:
        own.update(**saved)


def test_generation_ends_at_the_end_token(vlm):
    prompt = vlm.prompt(QUESTION, [picture(0, 64)])
    expected = greedy(vlm, prompt, 6)
    saved = vlm.eos_token_ids
    vlm.eos_token_ids = (len(vlm.processor.tokenizer) - 1, expected[2])
    try:
        end = expected.index(expected[2]) + 1
        assert generate(vlm, [prompt], 6)[0].tokens == expected[:end]
    finally:
        vlm.eos_token_ids = saved


def test_the_generation_config_is_restored_after_an_error(qwen):
    own = qwen.base.generation_config
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        generate(qwen, [qwen.located({"input_ids": torch.tensor([[10**6]])}, 0)], 2)
    assert qwen.base.generation_config is own


# --- options and refusals -------------------------------------------------------------------------


def test_names():
    assert resolve_name("phantom") == (resolve_name("phantom")[0], True)
    assert resolve_name("owner/name") == ("owner/name", False)
    with pytest.raises(ConfigError, match="did you mean 'phantom'"):
        resolve_name("phantm")
    for name in ("nothing", "./not/there", "/not/there", "~/model", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no model"):
            resolve_name(name)


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="nobody/nothing") as e:
        VisionLanguageModel.load("nobody/nothing")
    assert e.value.exit_code == 8 and len(str(e.value).splitlines()) == 1


def test_max_pixels_caps_what_the_model_reads(folder_of):
    folder = str(folder_of("qwen2_5_vl"))
    for pixels, tokens in ((None, 16), (32 * 32, 4), (16 * 16, 1)):
        processor = load_processor(folder, max_pixels=pixels)
        grid = processor(text=["<|image_pad|>"], images=[picture(0, 64)], return_tensors="pt")[
            "image_grid_thw"
        ]
        assert int(grid.prod()) // 4 == tokens


def test_max_pixels_is_refused_where_there_is_no_limit(folder_of):
    with pytest.raises(ConfigError, match="no pixel limit"):
        load_processor(str(folder_of("llava")), max_pixels=1024)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:64"}, "no device 'cuda:64'"),
        ({"device": "mps:64"}, "no device 'mps:64'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"adapter": "/not/there"}, "no adapter folder"),
    ],
)
def test_wrong_options_are_config_errors(folder_of, options, word):
    with pytest.raises(ConfigError, match=word):
        VisionLanguageModel.load(str(folder_of("llava")), **options)


def test_dtype(folder_of):
    vlm = VisionLanguageModel.load(str(folder_of("llava")), dtype="bfloat16", device="cpu")
    assert vlm.dtype == "bfloat16"
    assert generate(vlm, [vlm.prompt(QUESTION, [picture(0, 64)])], 2)


def test_a_folder_that_is_no_model(tmp_path, folder_of):
    with pytest.raises(ConfigError, match="no safetensors weights"):
        VisionLanguageModel.load(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder_of("llava") / name).read_bytes())
    with pytest.raises(ConfigError):
        VisionLanguageModel.load(str(tmp_path))


def test_a_local_model_has_no_revisions(folder_of) -> None:
    with pytest.raises(ConfigError, match="no revisions"):
        VisionLanguageModel.load(str(folder_of("llava")), revision="main")


def test_boxes_are_asked_for_only_where_pixels_are_the_pictures_own() -> None:
    """The tiny Qwen2.5-VL shrinks images to 64 x 64 at most."""
    vlm = tiny_vlm("qwen2_5_vl")
    assert vlm.box_convention(64) == "pixels"
    assert vlm.box_convention(448) is None
    assert tiny_vlm("qwen2_vl").box_convention(448) == "relative-1000"
    assert tiny_vlm("llava").box_convention(448) is None
