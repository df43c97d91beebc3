"""The answer mask, on five kinds of tokenizers and six templates, and batches."""

from __future__ import annotations

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vfl_train.data.collator import IGNORE, Collator, Encoded, Encoder, EncodingError, collate
from vfl_train.data.rows import (
    Image,
    ImageRef,
    Message,
    Reason,
    Row,
    RowError,
    Text,
    assistant_message,
    user_message,
)
from vfl_train.errors import DataError

FAMILIES = ("phantom", "qwen", "trimmed", "llava", "qwen2", "qwen3", "internvl", "gemma3")
CLOSING = {**dict.fromkeys(FAMILIES, "<|im_end|>"), "llava": "</s>", "gemma3": "<end_of_turn>"}

ask, answer = user_message, assistant_message
CONVERSATIONS = {
    "one turn": [ask("what text is written ?"), answer("three")],
    "no image": [ask("what text is written ?", images=0), answer("three")],
    "system": [Message("system", (Text("here is text"),)), ask("what text ?"), answer("three")],
    "three turns": [
        ask("what text ?"), answer("three"), ask("what is here ?", images=0), answer("text"),
        ask("is ?", images=0), answer("what"),
    ],
    "answer in question": [
        ask("three three ? three"), answer("three"), ask("three", images=0), answer("three three"),
    ],
    "image between answers": [ask("what ?"), answer("three"), ask("what ?", first=1), answer("text")],
    "two images at once": [ask("what text ?", images=2), answer("three")],
    "image last": [Message("user", (Text("what ?"), Image(0))), answer("three")],
    "trailing question": [ask("what ?"), answer("three"), ask("what ?", images=0)],
    "role as answer": [ask("what ?"), answer("user"), ask("assistant", images=0), answer("assistant")],
    "digits": [ask("what ?"), answer("3"), ask("what ?", images=0), answer("9 8")],
}  # fmt: skip
# Not for the phantom, whose words are a closed list.
FREE_TEXT = {
    "spaces around": [ask("what ?"), answer("  three cats \n"), ask("and ?", images=0), answer("\n\ntext ")],
    "newlines inside": [ask("what ?"), answer("three\n\n  cats,\n12 dogs.")],
    "wide characters": [
        ask("für \U0001f600 was?"), answer("né\U0001f468\u200d\U0001f469 漢字 …"), ask("?", 0), answer("ß"),
    ],
    "closing token inside": [ask("what ?"), answer("a <|im_end|> b </s> c")],
    "marker words": [ask("ASSISTANT: three USER:"), answer("ASSISTANT: three")],
    "one character": [ask("a"), answer("a"), ask("a", images=0), answer("a")],
}  # fmt: skip


def images_of(messages: list[Message]) -> list[PilImage.Image]:
    count = sum(isinstance(part, Image) for message in messages for part in message.content)
    return [PilImage.new("RGB", (64, 64), (40 * i, 9, 9)) for i in range(count)]


def supervised(encoder: Encoder, encoded: Encoded) -> list[str]:
    """The text of each contiguous run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, on in zip(encoded.inputs["input_ids"][0].tolist(), encoded.answer_mask.tolist(), strict=True):
        if on and not previous:
            runs.append([])
        if on:
            runs[-1].append(token)
        previous = on
    return [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def written(family: str, text: str) -> str:
    """An answer as the family's template and tokenizer write it."""
    return text.strip().replace("▁", " ") if family == "gemma3" else text


def answers_of(messages: list[Message]) -> list[str]:
    return [message.text for message in messages if message.role == "assistant"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_supervised_tokens_are_the_answers(encoders, family, name):
    messages, encoder = CONVERSATIONS[name], encoders[family]
    encoded = encoder.encode(messages, images_of(messages))
    runs = [run.replace(" ", "") for run in supervised(encoder, encoded)]
    assert runs == [text.replace(" ", "") + CLOSING[family] for text in answers_of(messages)]


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("name", FREE_TEXT)
def test_free_text_is_supervised_to_the_character(encoders, family, name):
    messages, encoder = FREE_TEXT[name], encoders[family]
    encoded = encoder.encode(messages, images_of(messages))
    for run, text in zip(supervised(encoder, encoded), answers_of(messages), strict=True):
        wanted = written(family, text) + CLOSING[family]
        if (
            family == "llava" or text[0].isspace()
        ):  # one token may hold the header's last space and the first here
            run, wanted = run.lstrip(), wanted.lstrip()
        assert run == wanted


WORDS = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(first=WORDS, question=WORDS, second=WORDS)
@pytest.mark.parametrize("family", ["qwen", "trimmed", "qwen3", "internvl", "gemma3"])
def test_any_text_is_supervised_to_the_character(encoders, family, first, question, second):
    texts = [unicodedata.normalize("NFC", text) for text in (first, second)]  # what the tokenizer does first
    messages = [ask("what ?", images=0), answer(texts[0]), ask(question, images=0), answer(texts[1])]
    runs = supervised(encoders[family], encoders[family].encode(messages, []))
    for run, text in zip(runs, texts, strict=True):
        wanted = written(family, text) + CLOSING[family]
        assert run == wanted or (text[0].isspace() and run.lstrip() == wanted.lstrip())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_is_what_comes_before_the_answer(encoders, family, name):
    """Training and generation see the same prompt: an independent way to the first supervised token."""
    messages, encoder = CONVERSATIONS[name], encoders[family]
    turn = next(i for i, message in enumerate(messages) if message.role == "assistant")
    prompt = encoder.encode_prompt(messages[:turn], images_of(messages[:turn]))
    full = encoder.encode(messages, images_of(messages))
    first = int(full.answer_mask.nonzero()[0, 0])
    assert prompt.length == first
    assert torch.equal(full.inputs["input_ids"][:, :first], prompt.inputs["input_ids"])
    assert prompt.n_answer_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_is_pure(encoders, family):
    messages = CONVERSATIONS["image between answers"]
    one, two = (encoders[family].encode(messages, images_of(messages)) for _ in range(2))
    assert one.inputs.keys() == two.inputs.keys()
    assert all(torch.equal(one.inputs[key], two.inputs[key]) for key in one.inputs)
    assert torch.equal(one.answer_mask, two.answer_mask)


def test_pixels_are_processed_once(encoders, monkeypatch):
    encoder = encoders["phantom"]
    calls = []
    inner = type(encoder.processor.image_processor).__call__
    count = lambda self, *args, **kwargs: calls.append(1) or inner(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(encoder.processor.image_processor), "__call__", count)
    messages = CONVERSATIONS["three turns"]
    encoder.encode(messages, images_of(messages))
    assert len(calls) == 1


def test_thinking_template_supervises_content_only(make_qwen_processor):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    encoder = Encoder(make_qwen_processor(template=template))
    messages = CONVERSATIONS["three turns"]
    encoded = encoder.encode(messages, images_of(messages))
    assert supervised(encoder, encoded) == ["three<|im_end|>", "text<|im_end|>", "what<|im_end|>"]


def test_template_of_plain_strings_gets_them(make_qwen_processor):
    """GLM-4.1V's writes the content of system and assistant turns as it is: given parts, it prints a list."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(make_qwen_processor(template=template))
    messages = [Message("system", (Text("be kind"),)), *CONVERSATIONS["three turns"]]
    encoded = encoder.encode(messages, images_of(messages))
    assert supervised(encoder, encoded) == ["three<|im_end|>", "text<|im_end|>", "what<|im_end|>"]
    text = encoder.tokenizer.decode(encoded.inputs["input_ids"][0])
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>") and "[{" not in text


def test_trimming_template_is_followed(make_qwen_processor):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(make_qwen_processor(template=template))
    messages = [ask("what ?"), answer("  three cats \n")]
    assert supervised(encoder, encoder.encode(messages, images_of(messages))) == ["three cats<|im_end|>"]


@pytest.mark.parametrize(
    "body",
    [
        "{{ c.text | upper }}",
        "{{ c.text }}{{ c.text }}",
        "{% if m.role != 'assistant' %}{{ c.text }}{% endif %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_template_that_rewrites_answers_is_refused(make_qwen_processor, body):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}"
        + body
        + "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(EncodingError) as caught:
        Encoder(make_qwen_processor(template=template)).encode([ask("what ?", 0), answer("three")], [])
    assert caught.value.code == Reason.not_encodable


def test_processor_without_template_is_refused(make_qwen_processor):
    with pytest.raises(DataError, match="no chat template"):
        Encoder(make_qwen_processor(template=None))


@pytest.mark.parametrize(
    ("family", "messages", "code"),
    [
        ("phantom", [ask("see <|image_pad|>"), answer("a")], Reason.placeholder_in_text),
        ("llava", [ask("see"), answer("an <image> tag")], Reason.placeholder_in_text),
        ("qwen", [ask("see", images=2), answer("a")], Reason.image_count_mismatch),
    ],
)
def test_rows_that_cannot_be_encoded(encoders, picture, family, messages, code):
    with pytest.raises(EncodingError) as caught:
        encoders[family].encode(messages, [picture])
    assert caught.value.code == code


def test_prompt_must_end_with_a_question(encoders, picture):
    with pytest.raises(EncodingError):
        encoders["phantom"].encode_prompt([ask("what ?"), answer("three")], [picture])


def test_image_the_processor_refuses_is_one_row_error(encoders):
    with pytest.raises(EncodingError) as caught:
        encoders["qwen"].encode([ask("what ?"), answer("a")], [PilImage.new("RGB", (3000, 2))])
    assert caught.value.code == Reason.not_encodable
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_pads_right_and_labels_answers(encoders, family):
    encoder = encoders[family]
    names = ("three turns", "no image", "image between answers")
    samples = [encoder.encode(CONVERSATIONS[n], images_of(CONVERSATIONS[n])) for n in names]
    batch = collate(samples, pad_token_id=0)
    length = max(sample.length for sample in samples)
    for index, sample in enumerate(samples):
        n = sample.length
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(batch[key][index, :n], sample.inputs[key][0])
        assert batch["attention_mask"][index, n:].sum() == 0
        on = batch["labels"][index] != IGNORE
        assert torch.equal(on[:n], sample.answer_mask) and not on[n:].any()
        assert torch.equal(batch["labels"][index][on], batch["input_ids"][index][on])
    pixels = [s.inputs["pixel_values"] for s in samples if "pixel_values" in s.inputs]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert "pixel_values" not in samples[1].inputs
    per_token = {"llava": [], "internvl": [], "gemma3": ["token_type_ids"]}.get(family, ["mm_token_type_ids"])
    assert all(batch[key].shape == (3, length) for key in per_token)
    assert ("image_grid_thw" in batch) == (per_token == ["mm_token_type_ids"])
    assert "image_grid_thw" not in batch or batch["image_grid_thw"].shape == (3, 3)


def test_batch_of_text_only_has_no_pixels(encoders):
    sample = encoders["phantom"].encode(CONVERSATIONS["no image"], [])
    assert "pixel_values" not in collate([sample, sample], 0)


def test_token_shaped_inputs_missing_in_one_sample_are_zero():
    def sample(length: int, **extra: torch.Tensor) -> Encoded:
        ones = torch.ones(1, length, dtype=torch.long)
        return Encoded({"input_ids": ones, "attention_mask": ones, **extra}, ones[0].bool())

    with_types = sample(
        3, token_type_ids=torch.ones(1, 3, dtype=torch.long), pixel_values=torch.ones(1, 2, 3)
    )
    batch = collate([with_types, sample(2), sample(3, pixel_values=torch.ones(1, 4, 3))], 0)
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert batch["pixel_values"].shape == (2, 4, 3)
    assert batch["pixel_values"][0].sum() == 6


def test_collator_opens_images_and_names_the_row(encoders, image_root):
    refs = tuple(ImageRef(image_root / name, None, name) for name in ("a.png", "gone.png"))
    good = Row(0, "u0", "src", (ask("what ?"), answer("three")), refs[:1], b"")
    bad = Row(7, "u7", "src", (ask("what ?"), answer("three")), refs[1:], b"", id="seven", line=8)
    collator = Collator(encoders["qwen"])
    assert collator([good, good])["input_ids"].shape[0] == 2
    with pytest.raises(RowError, match=r"row 7 \(line 8\) of src, id seven: gone.png") as caught:
        collator([good, bad])
    assert caught.value.code == Reason.image_missing
    assert caught.value.exit_code == 3
