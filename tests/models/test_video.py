"""Videos in prompts: one span each, from lists of frames, on both paths."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from PIL import Image
from tiny_models import tiny_vlm

from vfl_train.data import videos as videos_module
from vfl_train.data.rows import Image as ImagePart
from vfl_train.data.rows import Message, Reason, RowError, Text, Video, assistant_message
from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import FAMILIES
from vfl_train.models.generation import generate

VIDEO = [name for name, family in FAMILIES.items() if family.video]
QUESTION = "three cats ?"


@pytest.fixture(params=VIDEO)
def vlm(request) -> VisionLanguageModel:
    return tiny_vlm(request.param)


@pytest.fixture(params=["reference", "engine"])
def path(request) -> str:
    return request.param


def film(seed: int, frames: int = 4) -> list[Image.Image]:
    return [picture(100 * seed + n) for n in range(frames)]


def asked(vlm: VisionLanguageModel, *parts: Image.Image | list[Image.Image]):
    """A prompt of images and videos, in this order, and a question."""
    images, videos, content = [], [], []
    for part in parts:
        kind, listed = (Video, videos) if isinstance(part, list) else (ImagePart, images)
        content.append(kind(len(listed)))
        listed.append(part)
    return vlm.prompt_of([Message("user", (*content, Text(QUESTION)))], images, videos)


def same(one, other) -> None:
    """Equal log-probabilities, to fp32 rounding."""
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=1e-5)


def differ(one, other) -> None:
    assert abs(one.logprobs[0] - other.logprobs[0]) > 1e-4


# --- spans -----------------------------------------------------------------------------------------


def test_a_video_is_one_span_from_its_first_to_its_last_placeholder(vlm):
    prompt = vlm.prompt(QUESTION, [], [film(1)])
    ids = prompt.inputs["input_ids"][0].tolist()
    places = [i for i, token in enumerate(ids) if token in vlm.placeholder_ids]
    assert prompt.spans == ((places[0], places[-1] + 1),)
    assert prompt.grids[0][0] == 4, "frames are part of what must be equal"


def test_what_stands_between_frames_is_inside_the_span():
    """Qwen3-VL's timestamps, of two frames each at two frames a second; InternVL's frame numbers."""
    for family, texts in (("qwen3_vl", ["0.2 seconds", "1.2 seconds"]), ("internvl", ["Frame1", "Frame4"])):
        vlm = tiny_vlm(family)
        prompt = vlm.prompt(QUESTION, [], [film(1)])
        (start, stop), ids = prompt.spans[0], prompt.inputs["input_ids"][0]
        before, inside = (vlm.processor.tokenizer.decode(part) for part in (ids[:start], ids[start:stop]))
        assert texts[0] in before and texts[1] in inside


def test_spans_come_in_the_order_of_the_prompt(vlm):
    alone = {"image": asked(vlm, picture(1)).grids[0], "video": asked(vlm, film(2)).grids[0]}
    for order in (["image", "video"], ["video", "image"], ["video", "image", "video"]):
        prompt = asked(vlm, *(picture(1) if kind == "image" else film(2) for kind in order))
        assert list(prompt.spans) == sorted(prompt.spans) and len(prompt.spans) == len(order)
        assert list(prompt.grids) == [alone[kind] for kind in order]


@pytest.mark.parametrize(("family", "frames"), [("qwen2_5_vl", 3), ("qwen3_vl", 3), ("internvl", 2)])
def test_a_training_row_is_encoded_like_its_prompt(family, frames):
    """The answers are supervised and nothing else, also behind a video in the second turn. (InternVL's
    processor takes videos of one length only in a row.)"""
    vlm = tiny_vlm(family)
    first, second = (Message("user", (Video(n), ImagePart(n), Text(QUESTION))) for n in (0, 1))
    images, videos = [picture(1), picture(2)], [film(1, 2), film(2, frames)]
    turns = [first, assistant_message("12 dogs"), second]
    encoded = vlm.encoder.encode([*turns, assistant_message("three cats")], images, videos)
    ids = encoded.inputs["input_ids"][0]
    decode = vlm.processor.tokenizer.decode
    assert decode(ids[encoded.answer_mask]) == "12 dogs<|im_end|>three cats<|im_end|>"
    prompt = vlm.prompt_of(turns, images, videos)
    located = vlm.located(encoded.inputs, 4, encoded.places)
    assert (located.spans, located.grids) == (prompt.spans, prompt.grids)
    assert [place.frames for place in encoded.places] == [2, 0, frames, 0]


def test_the_frames_are_those_given_whatever_the_processor_is_set_to(monkeypatch):
    """Released video processors sample frames anew (Qwen3-VL: two a second of what they take for 24)."""
    vlm = tiny_vlm("qwen3_vl")
    plain = vlm.prompt(QUESTION, [], [film(1, 6)])
    monkeypatch.setattr(vlm.processor.video_processor, "do_sample_frames", True)
    again = vlm.prompt(QUESTION, [], [film(1, 6)])
    assert plain.inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert {**plain.inputs}.keys() == {**again.inputs}.keys()
    assert all(torch.equal(value, again.inputs[key]) for key, value in plain.inputs.items())


# --- both paths ------------------------------------------------------------------------------------


def test_forced_own_output_holds(vlm, path):
    """Generation with a cache and teacher forcing agree; 24 frames reach further in time than in space."""
    films = [film(1), film(2), film(1, 24)] if vlm.model_type != "internvl" else [film(1), film(2)]
    prompts = [vlm.prompt(QUESTION, [], [frames]) for frames in films]
    own = generate(vlm, prompts, 5)
    cost = Cost()
    rows = [Row(p, g.tokens) for p, g in zip(prompts, own, strict=True)]
    assert all(found.holds for found in read_out(vlm, rows, path, cost=cost))
    assert not cost.reasons


def test_a_swap_everywhere_equals_the_donor(vlm, path):
    host, donor = (vlm.prompt(QUESTION, [], [film(n)]) for n in (1, 2))
    branch, cost = swap(range(vlm.num_layers), "donor"), Cost()
    rows = [Row(host, (5, 7), branch, {"donor": donor}), Row(donor, (5, 7)), Row(host, (5, 7))]
    swapped, wanted, own = read_out(vlm, rows, path, cost=cost)
    same(swapped, wanted)
    differ(own, wanted)
    assert not cost.reasons, "the engine ran it"


def test_a_drop_everywhere_forgets_the_video_and_keeps_the_image(vlm, path):
    """Frames change nothing any more, the image before them does."""
    prompts = [asked(vlm, picture(image), film(n)) for image, n in ((1, 1), (1, 2), (3, 2))]
    everywhere = range(vlm.num_layers)
    blind = [Row(p, (5, 7), drop(everywhere, spans=[1])) for p in prompts]
    one, other, another_image = read_out(vlm, blind, path)
    same(one, other)
    differ(one, another_image)
    seen = list(read_out(vlm, [Row(p, (5, 7)) for p in prompts[:2]], path))
    differ(*seen)


def test_the_engine_agrees_with_the_reference(vlm):
    """Images and videos in one batch with text, drops and swaps of either; what the engine leaves to the
    reference path is what binds text between them."""
    both, donor = asked(vlm, film(1), picture(1)), asked(vlm, film(2), picture(2))
    branches = [(), drop([1]), drop([0, 2], spans=[0]), drop([1], spans=[1]), swap([2], "donor", spans=[1])]
    rows = [Row(both, (5, 7), b, {"donor": donor} if b and b[0].donor else {}) for b in branches]
    longer = vlm.prompt(QUESTION, [], [film(3, 6)])
    rows += [Row(longer, (5, 7), b) for b in ((), drop([1]), drop([3], phase="decode"))]
    rows += [Row(vlm.prompt(QUESTION), (5, 7))]
    cost = Cost()
    by_engine = list(read_out(vlm, rows, "engine", cost=cost))
    for one, other in zip(by_engine, read_out(vlm, rows, "reference"), strict=True):
        same(one, other)
    assert cost.reference_rows == 3 and "text between images is bound" in cost.reasons


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_swaps_between_videos_of_unequal_frames_are_refused(family):
    """Qwen pads three frames to the grid of four; their timestamps differ."""
    vlm = tiny_vlm(family)
    host, donor = (vlm.prompt(QUESTION, [], [film(1, n)]) for n in (3, 4))
    row = Row(host, (5,), swap([1], "donor"), {"donor": donor})
    with pytest.raises(ConfigError, match="grids differ"):
        list(read_out(vlm, [row]))


@pytest.mark.parametrize(
    ("video", "code", "words"),
    [
        ([], Reason.video_frames, "without frames"),
        ([picture(1), picture(1, 48)], Reason.video_frames, "differ in size"),
        ([picture(1)] * 769, Reason.video_frames, "769 frames"),
        ("clip.mp4", Reason.video_file, "ffmpeg"),
        ("https://example.com/clip.mp4", Reason.video_file, "ffmpeg"),
    ],
    ids=["empty", "sizes", "many", "file", "remote"],
)
def test_videos_that_are_refused(video, code, words):
    with pytest.raises(RowError, match=words) as caught:
        tiny_vlm("qwen2_5_vl").prompt(QUESTION, [], [video])
    assert caught.value.code == code


def test_frames_are_bounded_in_pixels(monkeypatch):
    monkeypatch.setattr(videos_module, "MAX_FRAME_PIXELS", 3 * 32 * 32)
    vlm = tiny_vlm("qwen2_5_vl")
    vlm.prompt(QUESTION, [], [film(1, 3)])
    with pytest.raises(RowError, match="more than 3072 pixels"):
        vlm.prompt(QUESTION, [], [film(1, 2), film(2, 2)])


def test_a_model_without_videos_says_so():
    with pytest.raises(RowError, match="LlavaProcessor takes no videos"):
        tiny_vlm("llava").prompt(QUESTION, [], [film(1)])


def test_a_family_whose_videos_nobody_tested_is_refused(monkeypatch):
    vlm = tiny_vlm("internvl")  # whose inputs do not show that there is a video
    monkeypatch.setattr(vlm, "family", type(vlm.family)())
    with pytest.raises(ConfigError, match="videos in a prompt of internvl are not supported"):
        vlm.prompt(QUESTION, [], [film(1)])


@pytest.mark.parametrize(("family", "token"), [("qwen3_vl", "<|video_pad|>"), ("internvl", "<video>")])
def test_the_placeholder_of_videos_in_a_text_is_refused(family, token):
    with pytest.raises(RowError) as caught:
        tiny_vlm(family).prompt(f"three {token} cats ?", [], [film(1)])
    assert caught.value.code == Reason.placeholder_in_text


def test_places_and_videos_must_match():
    vlm = tiny_vlm("qwen2_5_vl")
    with pytest.raises(RowError) as caught:
        vlm.prompt_of([Message("user", (Text(QUESTION),))], [], [film(1)])
    assert caught.value.code == Reason.video_count_mismatch
