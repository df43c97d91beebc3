"""Where answers stand in a chat as its template renders it: found with markers, matched to the character."""

from __future__ import annotations

import hashlib

from vfl_train.data.rows import Image, Message, Part, Reason, RowError, Text


class EncodingError(RowError):
    """A row that this model's processor cannot encode, or not with a certain answer mask."""


def content_parts(message: Message) -> list[dict[str, str]]:
    """The content parts of one turn; an answer is always one text."""
    if message.role == "assistant":
        return [{"type": "text", "text": message.text}]
    return [_template_part(part) for part in message.content]


def _template_part(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}


def text_of(turn: dict) -> str:
    """The text of an answer among content parts."""
    return turn["content"][0]["text"]


def as_plain(turn: dict) -> dict:
    """The turn with its text in place of its parts; as it is if some of them are no text."""
    texts = [part.get("text") for part in turn["content"]]
    return turn if None in texts else {**turn, "content": "".join(texts)}


def with_markers(chat: list[dict], turns: list[int]) -> tuple[list[dict], list[str]]:
    """The chat with each answer replaced by a marker that occurs nowhere else in it."""
    content = "\0".join(part.get("text", "") for message in chat for part in message["content"])
    stem = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    markers = [f"answer{order}of{stem}" for order in range(len(turns))]
    marked = list(chat)
    for turn, marker in zip(turns, markers, strict=True):
        marked[turn] = {"role": "assistant", "content": [{"type": "text", "text": marker}]}
    return marked, markers


def match_answers(text: str, frame: list[str], answers: list[str]) -> list[tuple[int, int]]:
    """Start and end of each answer, given the text around them. Templates may trim answers, nothing else."""
    spans, position = [], len(frame[0])
    fits = text.startswith(frame[0])
    for answer, following in zip(answers, frame[1:], strict=True):
        trims = (str.strip, str.lstrip, str.rstrip, lambda s: s.strip("\n"), lambda s: s.lstrip("\n"))
        forms = (answer, *(trim(answer) for trim in trims))
        form = next((form for form in forms if text.startswith(form + following, position)), None)
        if form is None:
            fits = False
            break
        spans.append((position, position + len(form)))
        position += len(form) + len(following)
    if not fits or position != len(text):
        detail = "the chat template writes an answer other than it is, so it cannot be located"
        raise EncodingError(Reason.not_encodable, detail)
    return spans


def shared_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    length = min(len(one), len(other))
    return one[: next((i for i in range(length) if one[i] != other[i]), length)]
