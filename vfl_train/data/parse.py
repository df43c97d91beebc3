"""How the JSON of a row becomes messages.

Two families of rows are read. `conversations` (LLaVA, ShareGPT) are turns with `from` and `value`;
`messages` (OpenAI style) are turns with `role` and `content`. Both become the same `Message` tuples.

An `<image>` marker in a text stands for the next image, a `<video>` marker for the next video, which is a
list of frames. One newline on either side belongs to the marker (LLaVA writes "<image>\\n"); all other
whitespace is the row's own and stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vfl_train.data.rows import (
    IMAGE_MARKER,
    VIDEO_MARKER,
    Image,
    ImageRef,
    Message,
    Part,
    Reason,
    RowError,
    Text,
    Video,
    one_line,
)
from vfl_train.data.videos import check_frame_count, video_file

MAX_TEXT_CHARS = 1_000_000  # of all turns of one row together; longer than any context window

_MARKER = re.compile(f"({IMAGE_MARKER}|{VIDEO_MARKER})")
ROLES = {  # the names in use for the three roles of a chat
    "system": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """The content of a row before its images are looked up; `images`, and the frames of each of `videos`, are
    the values as written."""

    family: str  # "conversations" or "messages"
    messages: tuple[Message, ...]
    images: tuple[object, ...]
    image_key: str  # "image", "images" or "" where the row has neither
    videos: tuple[tuple[object, ...], ...] = ()


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
    images = _Listed(Image, _image_values(value), Reason.image_count_mismatch)
    videos = _Listed(Video, _video_values(value), Reason.video_count_mismatch)
    messages = tuple(parse(value, turns, images, videos))
    images.check()
    videos.check()
    _check_turns(messages)
    check_frame_count([len(frames) for frames in videos.values])
    image_key = _one_key(value, "image", "images")
    parsed = ParsedRow(family, messages, tuple(images.values), image_key, tuple(videos.values))
    _check_text(parsed)
    return parsed


def _parse_conversations(value: dict, turns: list, images: _Listed, videos: _Listed) -> list[Message]:
    messages: list[Message] = []
    if isinstance(value.get("system"), str) and value["system"]:  # ShareGPT's top-level system prompt
        messages.append(Message("system", (Text(value["system"]),)))
    for position, turn in enumerate(turns):
        where = f"turn {position}"
        role = _role(_key(turn, "from", where), where)
        text = _expect(_key(turn, "value", where), str, f"`value` of {where}")
        messages.append(Message(role, _split_markers(text, images, videos)))
    if images.listed and not images.markers and value.get("image") is not None:
        return _prepend_images(messages, images)
    return messages


def _parse_messages(value: dict, turns: list, images: _Listed, videos: _Listed) -> list[Message]:
    messages: list[Message] = []
    for position, turn in enumerate(turns):
        where = f"turn {position}"
        role = _role(_key(turn, "role", where), where)
        content = _key(turn, "content", where)
        if isinstance(content, str):
            messages.append(Message(role, _split_markers(content, images, videos)))
            continue
        parts: list[Part] = []
        for entry in _expect(content, list, f"`content` of {where}"):
            parts += _content_part(entry, where, images, videos)
        messages.append(Message(role, tuple(parts)))
    return messages


def _content_part(entry: object, where: str, images: _Listed, videos: _Listed) -> list[Part]:
    kind = _key(entry, "type", f"a part of {where}")
    assert isinstance(entry, dict)  # else it would have no `type`
    if kind == "text":
        text = _expect(_key(entry, "text", f"a part of {where}"), str, f"`text` of {where}")
        return [Text(text)] if text else []
    if kind == "image":
        return [images.take(_first(entry, "image", "path", "url"))]
    if kind == "image_url":
        link = _key(entry, "image_url", f"a part of {where}")
        return [images.take(_key(link, "url", f"a part of {where}") if isinstance(link, dict) else link)]
    if kind == "video":
        named = _first(entry, "video", "path", "url")
        return [videos.take(None if named is None else _frames(named))]
    detail = f"{where} has a part of type {_show(kind)}; text, image and video can be read"
    raise RowError(Reason.wrong_type, detail)


class _Listed:
    """The images, or the videos, of a row: those listed beside the turns and those named in them."""

    def __init__(self, kind: type[Image] | type[Video], listed: tuple, code: Reason) -> None:
        self.kind, self.listed, self.code = kind, listed, code
        self.markers = 0  # places for a listed one
        self.values: list[Any] = []

    def take(self, named: object = None) -> Part:
        """The place of the next one in a turn: of `named`, or of the next that is listed."""
        if named is None:
            named = self.listed[self.markers] if self.markers < len(self.listed) else None
            self.markers += 1
        self.values.append(named)
        return self.kind(len(self.values) - 1)

    def check(self) -> None:
        """Raises RowError unless there is a place for each listed one, and one for each place."""
        if self.markers != len(self.listed):
            name = self.kind.__name__.lower()
            detail = f"{self.markers} {name} markers in the turns, {len(self.listed)} {name}s in the row"
            raise RowError(self.code, detail)


def _image_values(value: dict) -> tuple[object, ...]:
    """The values of `image` (one or a list) or `images` (a list)."""
    key = _one_key(value, "image", "images")
    if not key:
        return ()
    found = value[key]
    if key == "image" and isinstance(found, str | ImageRef):
        return (found,)
    return _references(_expect(found, list, f"`{key}`"), f"`{key}`")


def _video_values(value: dict) -> tuple[tuple[object, ...], ...]:
    """The frames of each video: of `videos` (a list of lists), or of the one `video` (a list)."""
    key = _one_key(value, "video", "videos")
    if not key:
        return ()
    found = value[key]
    videos = found if key == "videos" and isinstance(found, list) else [found]
    return tuple(_frames(video) for video in videos)


def _frames(value: object) -> tuple[object, ...]:
    if isinstance(value, str | dict):  # a path, or path and bytes as `datasets` has them
        raise video_file(value if isinstance(value, str) else value.get("path") or "an object")
    return _references(_expect(value, list, "a video"), "a video")


def _references(items: list, name: str) -> tuple[object, ...]:
    for item in items:
        if not isinstance(item, ImageRef):
            _expect(item, str, f"an entry of {name}")
    return tuple(items)


def _split_markers(text: str, images: _Listed, videos: _Listed) -> tuple[Part, ...]:
    pieces = _MARKER.split(text)  # texts and, between them, markers
    parts: list[Part] = []
    for position, piece in enumerate(pieces):
        if position % 2:
            parts.append(images.take() if piece == IMAGE_MARKER else videos.take())
            continue
        if position > 0:
            piece = piece.removeprefix("\n")
        if position < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(Text(piece))
    return tuple(parts)


def _prepend_images(messages: list[Message], images: _Listed) -> list[Message]:
    """LLaVA's own rule for rows with an image and no marker: it opens the first user turn."""
    user = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if user is None:
        raise RowError(Reason.turn_order, "there is no user turn to put the image into")
    opening = tuple(images.take() for _ in images.listed)
    return [*messages[:user], Message("user", opening + messages[user].content), *messages[user + 1 :]]


def _check_turns(messages: tuple[Message, ...]) -> None:
    """System first, then user and assistant in turn, none empty, and at least one answer."""
    if not any(m.role == "assistant" and m.text.strip() for m in messages):
        raise RowError(Reason.no_answer, "no assistant turn has text")
    expected = "user"
    for position, message in enumerate(messages):
        has_picture = any(not isinstance(part, Text) for part in message.content)
        if message.role == "system" and position == 0:
            continue
        if message.role != expected:
            detail = f"turn {position} is {message.role} where {expected} is due"
            raise RowError(Reason.turn_order, detail)
        if message.role == "assistant" and has_picture:
            raise RowError(Reason.image_in_answer, f"turn {position} is an answer with a picture in it")
        if not has_picture and not message.text.strip():
            raise RowError(Reason.empty_turns, f"turn {position} ({message.role}) is empty")
        expected = "assistant" if message.role == "user" else "user"


def _check_text(row: ParsedRow) -> None:
    text = "".join(message.text for message in row.messages)
    if len(text) > MAX_TEXT_CHARS:
        detail = f"{len(text)} characters of text, at most {MAX_TEXT_CHARS} are allowed"
        raise RowError(Reason.text_too_long, detail)
    try:
        text.encode("utf-8")
        pictures = (*row.images, *(frame for frames in row.videos for frame in frames))
        "".join(picture for picture in pictures if isinstance(picture, str)).encode("utf-8")
    except UnicodeEncodeError as error:
        broken = ascii(error.object[error.start])
        raise RowError(Reason.bad_utf8, f"the text holds the unpaired surrogate {broken}") from error


def _role(name: object, where: str) -> str:
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    raise RowError(Reason.bad_role, f"{where} is from {_show(name)}; known are {', '.join(ROLES)}")


def _one_key(value: dict, one: str, several: str) -> str:
    """Which of the two keys a row has, "" for neither. Raises RowError if it has both."""
    keys = [key for key in (one, several) if value.get(key) is not None]
    if len(keys) > 1:
        raise RowError(Reason.ambiguous_keys, f"the row has both `{one}` and `{several}`")
    return keys[0] if keys else ""


def _first(entry: dict, *keys: str) -> object:
    """The value of the first of `keys` that is there, or None."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


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
