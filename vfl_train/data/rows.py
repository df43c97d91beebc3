"""Rows of a training set: what a row is, what it is called, and why one is refused.

Rows come from outside and are not trusted: whatever is wrong with one raises `RowError` with a `Reason`,
and nothing else. `parse` makes a row of its JSON.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from vfl_train.errors import DataError

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"
MAX_ID_CHARS = 200


class Reason(StrEnum):
    """Why a row is refused: a closed list, so that reports can be counted and compared."""

    bad_json = "bad_json"
    bad_utf8 = "bad_utf8"
    not_an_object = "not_an_object"
    missing_key = "missing_key"
    wrong_type = "wrong_type"
    ambiguous_keys = "ambiguous_keys"
    bad_role = "bad_role"
    turn_order = "turn_order"
    empty_turns = "empty_turns"
    no_answer = "no_answer"
    text_too_long = "text_too_long"
    image_in_answer = "image_in_answer"
    image_count_mismatch = "image_count_mismatch"
    image_missing = "image_missing"
    image_outside_root = "image_outside_root"
    image_not_a_file = "image_not_a_file"
    remote_image = "remote_image"
    image_format = "image_format"
    image_unreadable = "image_unreadable"
    image_truncated = "image_truncated"
    image_too_large = "image_too_large"
    image_shape = "image_shape"
    video_count_mismatch = "video_count_mismatch"
    video_file = "video_file"
    video_frames = "video_frames"
    # Found with a model's processor in hand only (collator.py):
    placeholder_in_text = "placeholder_in_text"
    not_encodable = "not_encodable"
    too_long = "too_long"


class RowError(DataError):
    """One row cannot be used: `code` says why in one word, `detail` in one sentence."""

    def __init__(self, code: Reason, detail: str, fix: str = "") -> None:
        self.code, self.detail = code, one_line(detail)
        super().__init__(f"{self.detail} [{code}]", fix)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text of a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """The place of an image in a turn; `index` counts the images of the row from 0."""

    index: int


@dataclass(frozen=True, slots=True)
class Video:
    """The place of a video in a turn; `index` counts the videos of the row from 0."""

    index: int


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's text without its images and videos."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


class ImageBytes(Protocol):
    """An encoded image that lies inside a data file (a cell, an archive member), not read yet. Cheap to keep,
    hashable, and the same in every process."""

    def read(self) -> bytes:
        """The encoded bytes. Raises RowError if they are not there or too many, DataError if the file is
        damaged."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image not opened yet: a file (`path`, links resolved, known to lie under the image root), encoded
    `data`, or bytes inside a data file (`member`). `label` is how the row names it, for messages."""

    path: Path | None
    data: bytes | None
    label: str
    member: ImageBytes | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row. Each of its `videos` is a list of frames. `row` counts the input's rows from 0, `line`
    its lines from 1 (None where there are none). `raw` holds the exact bytes of the JSONL line (without
    "\\n") or of the JSON array's element, and nothing for other containers. `id` is the row's own name,
    shown in messages and never relied on; `uid` is ours and unique."""

    row: int
    uid: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    raw: bytes
    id: str = ""
    line: int | None = None
    videos: tuple[tuple[ImageRef, ...], ...] = ()

    @property
    def pictures(self) -> tuple[ImageRef, ...]:
        """Every picture of the row: its images, then the frames of its videos."""
        return (*self.images, *(frame for video in self.videos for frame in video))

    @property
    def turns(self) -> list[list]:
        """The turns as JSON: role and parts, an image as its number, a video as its number and its frames'
        count. With the content of `pictures`, all that the row shows a model."""
        return [[message.role, [self._part(part) for part in message.content]] for message in self.messages]

    def _part(self, part: Part) -> object:
        if isinstance(part, Video):
            return [part.index, len(self.videos[part.index])]
        return part.text if isinstance(part, Text) else part.index


@dataclass(frozen=True, slots=True)
class Rejected:
    """A quarantined row: where it is, its own name, and why it is refused."""

    row: int
    id: str
    code: Reason
    detail: str
    line: int | None

    def as_dict(self) -> dict[str, object]:
        """The object that stands for this row in quarantine.jsonl."""
        return {
            "row": self.row,
            "line": self.line,
            "id": self.id,
            "code": str(self.code),
            "detail": self.detail,
        }


def reject(row: Row, error: RowError) -> Rejected:
    """The quarantine entry for a row that a later step (encoding, scoring) cannot use."""
    return Rejected(row=row.row, id=row.id, code=error.code, detail=error.detail, line=row.line)


def user_message(text: str, images: int = 1, first: int = 0, videos: int = 0) -> Message:
    """A user turn of `images` images, numbered from `first`, and `videos` videos, followed by `text`."""
    pictures: list[Part] = [Image(first + i) for i in range(images)]
    return Message("user", (*pictures, *(Video(i) for i in range(videos)), Text(text)))


def assistant_message(text: str) -> Message:
    """An assistant turn."""
    return Message("assistant", (Text(text),))


def one_line(text: str, limit: int = 300) -> str:
    """`text` fit for a one-line message: control characters and unpaired surrogates escaped, cut at
    `limit` characters."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def row_id(value: object, row: int) -> str:
    """The row's own `id` when it has one that can be shown, else its position as "#row"."""
    own = value.get("id") if isinstance(value, dict) else None
    if isinstance(own, bool) or not isinstance(own, str | int) or own == "":
        return f"#{row}"
    return one_line(str(own), MAX_ID_CHARS)


def row_source(value: object, default: str) -> str:
    """The data set the row says it comes from (`source` or `dataset`), else `default`."""
    for key in ("source", "dataset"):
        name = value.get(key) if isinstance(value, dict) else None
        if isinstance(name, str) and name.strip():
            return one_line(name.strip())
    return default


def row_uid(source: str, row: int, value: object) -> str:
    """16 hex characters of the SHA-1 over source, position and content (key order and spacing do not
    count), so that scores of another file or another version of a row are never taken for this one's."""
    content = json.dumps([source, row, value], sort_keys=True, separators=(",", ":"), default=_label)
    return hashlib.sha1(content.encode("ascii"), usedforsecurity=False).hexdigest()[:16]


def _label(value: object) -> str:
    """What stands for an image inside the data file, or for a value that JSON does not have, in a uid."""
    return value.label if isinstance(value, ImageRef) else str(value)
