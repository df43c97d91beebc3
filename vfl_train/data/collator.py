"""From rows to tensors, with the one answer mask that training, selection and evaluation share.

What the model must produce in a row is each assistant turn's content and the token that closes the turn
(Cohere's models: the two that do).
Where that is, is not guessed from token ids: the chat template is rendered once more with the answers
replaced by markers, which gives every answer's place in the text; the processor reports where it
expanded image placeholders, the tokenizer where each token lies; and at the end the closing token must
stand exactly where it was computed. Whatever does not fit raises `EncodingError`.

A template that closes assistant turns with no special token (LLaVA-1.5) gets the tokenizer's end-of-text
token after each answer, as LLaVA's own training did; otherwise a model would never learn to stop.

Legend: T tokens of one sample, B samples of a batch.
What is not covered: thinking traces (a template that adds an empty one before the answer
keeps it, unsupervised).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from PIL.Image import Image as PilImage

from vfl_train.data.answers import (
    EncodingError,
    as_plain,
    content_parts,
    match_answers,
    shared_start,
    text_of,
    with_markers,
)
from vfl_train.data.padding import is_per_token, joined, padded
from vfl_train.data.placeholders import (
    Place,
    expansion,
    placeholders_of,
    places_of,
    put_before,
    replacements_of,
)
from vfl_train.data.rows import Image, Message, Reason, Row, RowError, Video
from vfl_train.data.videos import open_row, processor_options
from vfl_train.errors import DataError

IGNORE = -100  # the label that the loss leaves out
# What a processor raises of input that it cannot take.
_PROCESSOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration, RuntimeError)
_TOKEN_KEYS = ("input_ids", "attention_mask")
_BOOKKEEPING = ("offset_mapping", "text_replacement_offsets", "labels", *_TOKEN_KEYS)


@dataclass(frozen=True)
class Encoded:
    """One sample, ready for the model. `inputs` are the processor's tensors (input_ids and attention_mask
    [1, T], pixel values in the processor's own shape), `answer_mask` bool [T] is true on the tokens
    the model must produce. `places`: one for each image and video, in the order of the prompt, or () where
    the processor does not say."""

    inputs: dict[str, torch.Tensor]
    answer_mask: torch.Tensor
    places: tuple[Place, ...] = ()

    @property
    def n_answer_tokens(self) -> int:
        """Supervised tokens, the closing ones included."""
        return int(self.answer_mask.sum())

    @property
    def length(self) -> int:
        """Tokens of the sample, image tokens included."""
        return self.answer_mask.shape[0]


@dataclass(frozen=True)
class _Answer:
    """One answer in the rendered text, in characters: from `start` (what the generation prompt leaves to
    the model) to `end`, the end of the closing special token `closing`."""

    start: int
    end: int
    closing: str


class Encoder:
    """Turns messages, images and videos into model inputs. Pure: the same arguments give the same tensors.

    Raises:
        DataError: the processor has no chat template or no fast tokenizer.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        if not getattr(processor, "chat_template", None):
            fix = "use an instruction-tuned model, or put its chat_template.jinja into the model folder"
            raise DataError("the model's processor has no chat template", fix)
        if not tokenizer.is_fast:
            raise DataError("the model has no fast tokenizer, which token positions need", "convert it")
        self.processor, self.tokenizer = processor, tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
        token = "|".join(map(re.escape, longest_first))
        self._closing = re.compile(rf"\s*(?:{token})*({token})")
        self.placeholder_ids, self._placeholders = placeholders_of(processor)
        self.answer_token_type: int = getattr(processor, "answer_token_type", 0)

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[PilImage],
        videos: Sequence[Sequence[PilImage]] = (),
        add_generation_prompt: bool = False,
        max_pixels: int | None = None,
    ) -> Encoded:
        """Encode a conversation, with the answer mask over its assistant turns.

        Args:
            messages: the turns; their `Image` parts stand for `images`, their `Video` parts for `videos`,
                in order.
            images: RGB images.
            videos: the RGB frames of each.
            add_generation_prompt: end with the header of an assistant turn.
            max_pixels: pixels an image is resized to at most, below the processor's own limit (no frame is).

        Raises:
            EncodingError: the processor cannot encode it, or the answers cannot be located for certain.
        """
        chat = self._chat(messages, images, videos)
        text = self._render(chat, add_generation_prompt)
        text, answers = self._close_turns(text, self._locate(chat, text, add_generation_prompt))
        outputs = self._process(text, images, videos, max_pixels)
        mask = self._answer_mask(outputs, text, answers)
        inputs = {key: outputs[key] for key in _TOKEN_KEYS}
        inputs.update((key, _single(value)) for key, value in outputs.items() if key not in _BOOKKEEPING)
        if self.answer_token_type:
            inputs["token_type_ids"][0, mask] = self.answer_token_type
        return Encoded(inputs, mask, places_of(outputs, images, videos))

    def encode_prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[PilImage],
        videos: Sequence[Sequence[PilImage]] = (),
    ) -> Encoded:
        """Encode a conversation that waits for an answer: its last turn is the user's and the header of
        the assistant's turn follows. Arguments and errors as in `encode`."""
        if not messages or messages[-1].role == "assistant":
            raise EncodingError(Reason.turn_order, "a prompt must end with a user turn")
        return self.encode(messages, images, videos, add_generation_prompt=True)

    def _chat(self, messages: Sequence[Message], images: Sequence, videos: Sequence) -> list[dict]:
        """The messages as chat templates take them. An answer's pieces become one text."""
        for kind, given, code in (
            (Image, images, Reason.image_count_mismatch),
            (Video, videos, Reason.video_count_mismatch),
        ):
            count = sum(isinstance(part, kind) for message in messages for part in message.content)
            if count != len(given):
                name = kind.__name__.lower()
                raise EncodingError(code, f"{count} {name} places in the messages, {len(given)} {name}s")
        for message in messages:
            found = next((token for token in self._placeholders if token in message.text), None)
            if found:
                detail = f"the text ({message.role}) contains {found}, which this model takes for a picture"
                raise EncodingError(Reason.placeholder_in_text, detail)
        return [{"role": message.role, "content": content_parts(message)} for message in messages]

    def _render(self, chat: list[dict], add_generation_prompt: bool) -> str:
        text = self._apply(chat, add_generation_prompt)
        # A template that takes plain strings where we give it parts prints the list as Python does.
        plain = [as_plain(message) if str(message["content"]) in text else message for message in chat]
        return text if plain == chat else self._apply(plain, add_generation_prompt)

    def _apply(self, chat: list[dict], add_generation_prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            detail = f"the chat template refuses the row: {error}"
            raise EncodingError(Reason.not_encodable, detail) from error

    def _locate(self, chat: list[dict], text: str, add_generation_prompt: bool) -> list[_Answer]:
        """Where the answers are in `text`; `closing` is "" where the template closes no turn."""
        turns = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
        if not turns:
            return []
        marked, markers = with_markers(chat, turns)
        frame = self._frame(self._render(marked, add_generation_prompt), markers)
        spans = match_answers(text, frame, [text_of(chat[turn]) for turn in turns])
        answers = []
        for order, (turn, (start, end)) in enumerate(zip(turns, spans, strict=True)):
            prompt = self._render(chat[:turn], True)
            if text.startswith(prompt) and not text[len(prompt) : start].strip():
                start = min(start, len(prompt))  # the whitespace between header and content is generated
            own = self._render(marked[: turn + 1], False).rpartition(markers[order])[2]
            # Only what belongs to this turn may close it, not the header of the next.
            closing = self._closing.match(shared_start(own, text[end:]))
            answers.append(
                _Answer(start, end + closing.end(), closing[1]) if closing else _Answer(start, end, "")
            )
        return answers

    def _frame(self, rendered: str, markers: list[str]) -> list[str]:
        """The text around the answers: before the first, between, after the last."""
        frame = []
        for marker in markers:
            before, found, rendered = rendered.partition(marker)
            if not found or marker in rendered:
                raise EncodingError(Reason.not_encodable, "the chat template drops or repeats an answer")
            frame.append(before)
        return [*frame, rendered]

    def _close_turns(self, text: str, answers: list[_Answer]) -> tuple[str, list[_Answer]]:
        """Insert the end-of-text token behind answers whose turn the template leaves open."""
        closed, added = [], 0
        for answer in answers:
            start, end, closing = answer.start + added, answer.end + added, answer.closing
            if not closing:
                closing = self.tokenizer.eos_token
                if not closing:
                    detail = "the chat template does not close assistant turns, and there is no eos token"
                    raise EncodingError(Reason.not_encodable, detail)
                text = text[:end] + closing + text[end:]
                end, added = end + len(closing), added + len(closing)
            closed.append(_Answer(start, end, closing))
        return text, closed

    def _process(
        self,
        text: str,
        images: Sequence[PilImage],
        videos: Sequence[Sequence[PilImage]],
        max_pixels: int | None,
    ) -> Mapping[str, Any]:
        bos = self.tokenizer.bos_token
        options = processor_options(self.processor, videos)
        if bos and text.startswith(bos):
            options["add_special_tokens"] = False
        if max_pixels is not None and images:
            fewest = min(self.processor.image_processor.size["shortest_edge"], max_pixels)
            options["images_kwargs"] = {"size": {"shortest_edge": fewest, "longest_edge": max_pixels}}
        try:
            return self.processor(
                text=[text],
                images=[list(images)] if images else None,
                return_tensors="pt",
                padding=False,
                truncation=False,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **options,
            )
        except _PROCESSOR_ERRORS as error:
            raise EncodingError(Reason.not_encodable, f"the processor refuses the row: {error}") from error

    def _answer_mask(self, outputs: Mapping[str, Any], text: str, answers: list[_Answer]) -> torch.Tensor:
        """Bool [T]. Checks that each answer ends with its closing token, in id and in position."""
        ids = outputs["input_ids"][0].tolist()
        mask = torch.zeros(len(ids), dtype=torch.bool)
        if not answers:
            return mask
        starts, ends = outputs["offset_mapping"][0].T.tolist()  # characters of the expanded text, per token
        shift = expansion(replacements_of(outputs))
        before = put_before(self.processor, text)
        for answer in answers:
            start, end = shift(before + answer.start), shift(before + answer.end)
            last = self._closing_token(ids, starts, ends, answer.closing, end)
            first = last
            # A token of no width at `start` is either whitespace of the header (some tokenizers trim it) or
            # the dummy prefix that others put before a word; the model has to produce only the latter.
            zero_width_counts = not text[: answer.start][-1:].isspace()
            while first > 0 and (
                ends[first - 1] > start or (zero_width_counts and starts[first - 1] == start > 0)
            ):
                first -= 1
            mask[first : last + 1] = True
        return mask

    def _closing_token(
        self, ids: list[int], starts: list[int], ends: list[int], closing: str, end: int
    ) -> int:
        """The index of the token `closing` whose text ends at `end`."""
        wanted, start = self.tokenizer.convert_tokens_to_ids(closing), end - len(closing)
        for index in range(bisect.bisect_left(ends, end), len(ids)):
            if ids[index] == wanted and starts[index] <= start and end <= ends[index]:
                return index
        detail = f"the end of an answer ({closing}) is not a token where it should be"
        raise EncodingError(Reason.not_encodable, detail)


def _single(value: Any) -> Any:
    """Floats in float32: Llama 4's processor makes bfloat16, which a model in float32 does not take."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Collator:
    """Makes one padded batch of rows. What it does for a row depends on that row only."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.pad_token_id = pad_token_id(encoder.tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of `rows`, as `collate` returns it.

        Raises:
            RowError: naming the row, when an image or the text cannot be used.
        """
        return collate([self.encode(row) for row in rows], self.pad_token_id)

    def max_pixels(self, row: Row) -> int | None:
        """A limit for this row's images below the processor's own, None for none."""
        return None

    def encode(self, row: Row) -> Encoded:
        """One row, its images and videos opened. Raises RowError naming the row."""
        try:
            return self.encoder.encode(row.messages, *open_row(row), max_pixels=self.max_pixels(row))
        except RowError as error:
            where = f"row {row.row}" + (f" (line {row.line})" if row.line else "")
            detail = f"{where} of {row.source}, id {row.id or '-'}: {error.detail}"
            raise RowError(error.code, detail, "remove the row; `vfl-train data check` finds more") from error


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with. Padding is masked everywhere, so the end-of-text token serves as well, and 0."""
    found = (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None)
    return next(found, 0)


def collate(samples: Sequence[Encoded], pad_token_id: int) -> dict[str, Any]:
    """One batch of B samples, padded on the right to the longest, T tokens.

    Returns:
        input_ids, attention_mask and labels [B, T] (labels are -100 outside the answer masks); further
        inputs with one value per token (token types) padded with 0, or filled with 0 where a sample has
        none; all others (pixel values, grids) joined along their first axis, smaller ones padded with 0
        in the other axes as image processors do.
    """
    length = max(sample.length for sample in samples)
    batch = {
        "input_ids": padded([sample.inputs["input_ids"] for sample in samples], length, pad_token_id),
        "attention_mask": padded([sample.inputs["attention_mask"] for sample in samples], length, 0),
    }
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
    for index, sample in enumerate(samples):
        answer = sample.answer_mask.nonzero()[:, 0]
        batch["labels"][index, answer] = sample.inputs["input_ids"][0, answer]
    for key in dict.fromkeys(key for sample in samples for key in sample.inputs if key not in batch):
        having = [sample for sample in samples if key in sample.inputs]
        if key == "cross_attention_mask" and len(having) < len(samples):
            raise DataError(
                "rows with and without images cannot share a batch of a model with cross-attention",
                "use --per-device-train-batch-size 1, or leave one kind out",
            )
        if all(is_per_token(key, sample.inputs[key], sample.length) for sample in having):
            empty = having[0].inputs[key][:, :0]
            batch[key] = padded([sample.inputs.get(key, empty) for sample in samples], length, 0)
        else:
            batch[key] = joined([sample.inputs[key] for sample in having])
    return batch
