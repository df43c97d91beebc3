"""How the JSON of a row becomes messages.

Two families of rows are read. `conversations` (LLaVA, ShareGPT) are turns with `from` and `value`;
`messages` (OpenAI style) are turns with `role` and `content`. Both become the same `Message` tuples.

An `<image>` marker in a text stands for the next image. One newline on either side belongs to the
marker (LLaVA writes "<image>\\n"); all other whitespace is the row's own and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfl_train.data.rows import IMAGE_MARKER, Image, ImageRef, Message, Part, Reason, RowError, Text, one_line

MAX_TEXT_CHARS = 1_000_000  # of all turns of one row together; longer than any context window

ROLES = {  # the names in use for the three roles of a chat
    "system": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """The content of a row before its images are looked up; `images` are the values as written."""

    family: str  # "conversations" or "messages"
    messages: tuple[Message, ...]
    images: tuple[object, ...]
    image_key: str  # "image", "images" or "" where the row has neither


def parse_row(value: object) -> ParsedRow:
    """Read one decoded JSON value as a row of either family.

    Raises:
        RowError: with the first thing that is wrong with it.
    """
    if not isinstance(value, dict):
        raise RowError(Reason.not_an_object, f"the row is {_kind(value)}, not an object")
    families = [key for key in ("conversations", "messages") if value.get(key) is not None]
    if len(families) > 1:
        raise RowError(Reason.ambiguous_keys, "the row has both `conversations` and `messages`")
    if not families:
        raise RowError(Reason.missing_key, "the row has neither `conversations` nor `messages`")
    family = families[0]
    turns = _expect(value[family], list, f"`{family}`")
    if not turns:
        raise RowError(Reason.empty_turns, f"`{family}` is empty")
    parse = _parse_conversations if family == "conversations" else _parse_messages
    messages, images = parse(value, turns)
    _check_turns(messages)
    _check_text(messages, images)
    image_key = next((key for key in ("image", "images") if value.get(key) is not None), "")
    return ParsedRow(family, messages, images, image_key)


def _parse_conversations(value: dict, turns: list) -> tuple[tuple[Message, ...], tuple]:
    images = _image_values(value)
    messages: list[Message] = []
    count = 0
    if isinstance(value.get("system"), str) and value["system"]:  # ShareGPT's top-level system prompt
        messages.append(Message("system", (Text(value["system"]),)))
    for position, turn in enumerate(turns):
        where = f"turn {position}"
        role = _role(_key(turn, "from", where), where)
        content = _split_markers(_expect(_key(turn, "value", where), str, f"`value` of {where}"), count)
        count += sum(isinstance(part, Image) for part in content)
        messages.append(Message(role, content))
    if images and count == 0 and value.get("image") is not None:
        messages, count = _prepend_images(messages, len(images)), len(images)
    _check_image_count(count, len(images))
    return tuple(messages), images


def _parse_messages(value: dict, turns: list) -> tuple[tuple[Message, ...], tuple]:
    listed = _image_values(value)
    images: list[object] = []
    messages: list[Message] = []
    used = markers = 0  # of `listed`
    for position, turn in enumerate(turns):
        where = f"turn {position}"
        role = _role(_key(turn, "role", where), where)
        content: list[Part] = []
        for part in _content_parts(_key(turn, "content", where), where):
            if isinstance(part, Text):
                content.append(part)
                continue
            if part is None:  # takes the next of `listed`
                markers += 1
                part = listed[used] if used < len(listed) else None
                used = min(used + 1, len(listed))
            content.append(Image(len(images)))
            images.append(part)
        messages.append(Message(role, tuple(content)))
    _check_image_count(markers, len(listed))
    return tuple(messages), tuple(images)


def _content_parts(content: object, where: str) -> list:
    """`Text`, None for an image that is listed in `images`, or the value that names the image."""
    if isinstance(content, str):
        return [None if isinstance(part, Image) else part for part in _split_markers(content, 0)]
    parts: list = []
    for entry in _expect(content, list, f"`content` of {where}"):
        kind = _key(entry, "type", f"a part of {where}")
        if kind == "text":
            text = _expect(_key(entry, "text", f"a part of {where}"), str, f"`text` of {where}")
            parts.extend([Text(text)] if text else [])
        elif kind == "image":
            named = [entry[key] for key in ("image", "path", "url") if entry.get(key) is not None]
            parts.append(named[0] if named else None)
        elif kind == "image_url":
            link = _key(entry, "image_url", f"a part of {where}")
            parts.append(_key(link, "url", f"a part of {where}") if isinstance(link, dict) else link)
        else:
            detail = f"{where} has a part of type {_show(kind)}; text and image can be read"
            raise RowError(Reason.wrong_type, detail)
    return parts


def _image_values(value: dict) -> tuple[object, ...]:
    """The values of `image` (one or a list) or `images` (a list)."""
    keys = [key for key in ("image", "images") if value.get(key) is not None]
    if len(keys) > 1:
        raise RowError(Reason.ambiguous_keys, "the row has both `image` and `images`")
    if not keys:
        return ()
    found = value[keys[0]]
    if keys[0] == "image" and isinstance(found, str | ImageRef):
        return (found,)
    for item in _expect(found, list, f"`{keys[0]}`"):
        if not isinstance(item, ImageRef):
            _expect(item, str, f"an entry of `{keys[0]}`")
    return tuple(found)


def _split_markers(text: str, first: int) -> tuple[Part, ...]:
    if IMAGE_MARKER not in text:
        return (Text(text),) if text else ()
    pieces = text.split(IMAGE_MARKER)
    parts: list[Part] = []
    for position, piece in enumerate(pieces):
        if position > 0:
            parts.append(Image(first + position - 1))
            piece = piece.removeprefix("\n")
        if position < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(Text(piece))
    return tuple(parts)


def _prepend_images(messages: list[Message], count: int) -> list[Message]:
    """LLaVA's own rule for rows with an image and no marker: it opens the first user turn."""
    user = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if user is None:
        raise RowError(Reason.turn_order, "there is no user turn to put the image into")
    images = tuple(Image(index) for index in range(count))
    opened = Message("user", images + messages[user].content)
    return [*messages[:user], opened, *messages[user + 1 :]]


def _check_image_count(markers: int, images: int) -> None:
    if markers != images:
        detail = f"{markers} image markers in the turns, {images} images in the row"
        raise RowError(Reason.image_count_mismatch, detail)


def _check_turns(messages: tuple[Message, ...]) -> None:
    """System first, then user and assistant in turn, none empty, and at least one answer."""
    if not any(m.role == "assistant" and m.text.strip() for m in messages):
        raise RowError(Reason.no_answer, "no assistant turn has text")
    expected = "user"
    for position, message in enumerate(messages):
        has_image = any(isinstance(part, Image) for part in message.content)
        if message.role == "system" and position == 0:
            continue
        if message.role != expected:
            detail = f"turn {position} is {message.role} where {expected} is due"
            raise RowError(Reason.turn_order, detail)
        if message.role == "assistant" and has_image:
            raise RowError(Reason.image_in_answer, f"turn {position} is an answer with an image in it")
        if not has_image and not message.text.strip():
            raise RowError(Reason.empty_turns, f"turn {position} ({message.role}) is empty")
        expected = "assistant" if message.role == "user" else "user"


def _check_text(messages: tuple[Message, ...], images: tuple[object, ...]) -> None:
    text = "".join(message.text for message in messages)
    if len(text) > MAX_TEXT_CHARS:
        detail = f"{len(text)} characters of text, at most {MAX_TEXT_CHARS} are allowed"
        raise RowError(Reason.text_too_long, detail)
    try:
        text.encode("utf-8")
        "".join(image for image in images if isinstance(image, str)).encode("utf-8")
    except UnicodeEncodeError as error:
        broken = ascii(error.object[error.start])
        raise RowError(Reason.bad_utf8, f"the text holds the unpaired surrogate {broken}") from error


def _role(name: object, where: str) -> str:
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    raise RowError(Reason.bad_role, f"{where} is from {_show(name)}; known are {', '.join(ROLES)}")


def _key(entry: object, key: str, where: str) -> object:
    if not isinstance(entry, dict):
        raise RowError(Reason.wrong_type, f"{where} is {_kind(entry)}, not an object")
    if key not in entry:
        raise RowError(Reason.missing_key, f"{where} has no `{key}`")
    return entry[key]


def _expect(value: object, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "a string"
        raise RowError(Reason.wrong_type, f"{name} is {_kind(value)}, not {wanted}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _show(value: object) -> str:
    return one_line(f"`{value}`", 40) if isinstance(value, str) else _kind(value)
