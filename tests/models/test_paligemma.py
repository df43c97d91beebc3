"""PaliGemma has no chat template and a bidirectional prefix; our encoding against its processor's own."""

from __future__ import annotations

import shutil

import pytest
import torch
from pictures import picture
from tiny_models import tiny_vlm
from transformers import AutoProcessor

from vfl_train.data.answers import EncodingError
from vfl_train.data.rows import Message, Text, user_message
from vfl_train.interventions import Row, drop, knockout, read_out
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families.paligemma import SAVED

QUESTION = "three cats ?"


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm("paligemma")


@pytest.fixture(scope="module")
def folder(vlm, tmp_path_factory):
    """Saved after use."""
    path = tmp_path_factory.mktemp("paligemma")
    vlm.model.save_pretrained(path)
    vlm.processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def own(folder):
    """Transformers' own processor, from what we saved."""
    return AutoProcessor.from_pretrained(folder)


def test_the_saved_template_asks_transformers_own_processor_the_same(vlm, own):
    assert type(own).__name__ == "PaliGemmaProcessor" and own.chat_template == SAVED
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = own.apply_chat_template(chat, add_generation_prompt=True)
    found = own(text=[text], images=[[picture(0)]], return_tensors="pt")["input_ids"]
    assert torch.equal(found, vlm.prompt(QUESTION, [picture(0)]).inputs["input_ids"])


def test_a_folder_as_released_has_no_template(folder, tmp_path, vlm):
    shutil.copytree(folder, tmp_path / "released")
    (tmp_path / "released" / "chat_template.jinja").unlink()
    loaded = VisionLanguageModel.load(str(tmp_path / "released"), device="cpu")
    asked = [v.prompt(QUESTION, [picture(0)]).inputs["input_ids"] for v in (loaded, vlm)]
    assert torch.equal(*asked)


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_is_encoded_as_the_processor_does(vlm, own, count):
    images = [picture(i) for i in range(count)]
    messages = [user_message(QUESTION, count), Message("assistant", (Text("12 dogs"),))]
    found = vlm.encoder.encode(messages, images)
    wanted = own(
        text=["<image>" * count + QUESTION], images=[images], suffix=["12 dogs"], return_tensors="pt"
    )
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(found.inputs[key], wanted[key]), key
    assert torch.equal(found.answer_mask, wanted["labels"][0] != -100)
    asked = vlm.prompt(QUESTION, images)
    assert torch.equal(asked.inputs["input_ids"][0], found.inputs["input_ids"][0, ~found.answer_mask])


def test_the_prefix_sees_all_of_itself_and_nothing_of_the_answer(vlm):
    """The image reads the question; a forced answer changes nothing before it."""
    prompt = vlm.prompt(QUESTION, [picture(0)])
    with torch.no_grad():
        first = [
            vlm.model(**vlm.prompt(q, [picture(0)]).inputs, output_hidden_states=True).hidden_states[1][0, 0]
            for q in (QUESTION, "12 dogs ?")
        ]
    assert (first[0] - first[1]).abs().max() > 1e-4
    for branch in ((), drop([1, 2])):
        rows = [Row(prompt, (5, *rest), branch) for rest in ((), (7,), (9, 11))]
        said = [r.logprobs[0] for r in read_out(vlm, rows, "reference")]
        assert said == pytest.approx(said[:1] * 3, abs=1e-5)


def test_padding_is_no_part_of_the_prefix(vlm):
    """Rows of unequal length in one batch, on the path that hides padding by causality alone."""
    prompts = [
        vlm.prompt(q, [picture(i)]) for i, q in enumerate((QUESTION, "three cats, 12 dogs. " + QUESTION))
    ]
    rows = [Row(p, (5, 7), branch) for p in prompts for branch in ((), knockout([1]), knockout([2], "mlp"))]
    cost = Cost()
    together = [r.logprobs for r in read_out(vlm, rows, "engine", cost=cost)]
    alone = [next(read_out(vlm, [row], "reference")).logprobs for row in rows]
    assert cost.reference_rows == 0
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    "messages",
    [
        [Message("system", (Text("be kind"),)), user_message(QUESTION, 1)],
        [user_message(QUESTION, 1), Message("assistant", (Text("12"),)), user_message("and dogs ?", 0)],
    ],
)
def test_what_has_no_form_is_refused(vlm, messages):
    with pytest.raises(EncodingError, match="one question and its answer"):
        vlm.encoder.encode_prompt(messages, [picture(0)])
