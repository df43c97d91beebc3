"""Side files with which other trainers read a selection: LLaMA-Factory (dataset_info.json), ms-swift (JSONL).

LLaMA-Factory registers a file in dataset_info.json and reads turns of strict roles, contents that are one
text, and exactly one `<image>` per image; a file that is not like that in every row is left as it is and a
converted copy is registered. ms-swift reads messages with an `images` list; its `channel` key, here the
bucket, gives a loss curve per function with `--enable_channel_loss true`. Image paths stay relative to the
image root; `hint` says how to name it to the trainer.

Sources: LLaMA-Factory data/README.md and src/llamafactory/data/converter.py; ms-swift
docs/source_en/Customization/Custom-dataset.md and swift/llm/template/vision_utils.py.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vfl_train.data.images import encoded_bytes
from vfl_train.data.output import replacing, write_file
from vfl_train.data.pool import Pool
from vfl_train.data.readers import PoolRows
from vfl_train.data.rows import IMAGE_MARKER, Image, ImageRef, Message, Row, Text
from vfl_train.errors import ConfigError

log = logging.getLogger(__name__)

EMITS = ("llamafactory", "swift")
NAME = "vfl_selected"  # of the data set in dataset_info.json
INFO, COPY = "dataset_info.json", "llamafactory.parquet"
SWIFT, SWIFT_IMAGES = "swift.jsonl", "swift_images"
_TAGS = {
    "conversations": {
        "role_tag": "from", "content_tag": "value",
        "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
    },
    "messages": {
        "role_tag": "role", "content_tag": "content",
        "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    },
}  # fmt: skip
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}


def emit(
    kind: str, pool: Pool, rows: Sequence[int], buckets: Mapping[int, str], folder: Path, selected: str
) -> list[Path]:
    """Write the side files of a selection for one trainer.

    Args:
        kind: one of EMITS.
        pool: where the rows come from.
        rows: numbers of the selected rows, ascending, all of them usable.
        buckets: the bucket of each of these rows.
        folder: where the selection lies.
        selected: name of the selected file in it.

    Returns:
        The files and folders written.

    Raises:
        ConfigError: no such kind.
        DataError: a row can no longer be read.
        DiskError: a file cannot be written.
    """
    if kind not in EMITS:
        raise ConfigError(f"--emit takes {' or '.join(EMITS)}, not {kind}")
    chosen = PoolRows(pool, list(rows))
    if kind == "llamafactory":
        return _llamafactory(chosen, folder, selected)
    return _swift(chosen, buckets, folder)


def hint(kind: str, pool: Pool, folder: Path) -> str:
    """The options with which the trainer reads what `emit` wrote."""
    if kind == "llamafactory":
        return f"dataset_dir: {folder}, dataset: {NAME}, media_dir: {pool.image_root}"
    root = folder if _is_embedded(pool) else pool.image_root
    data = shlex.quote(str(folder / SWIFT))
    return f"ROOT_IMAGE_DIR={shlex.quote(str(root))} swift sft --dataset {data} --enable_channel_loss true"


def _llamafactory(rows: PoolRows, folder: Path, selected: str) -> list[Path]:
    entry: dict[str, Any] = {"file_name": selected, "formatting": "sharegpt"}
    family = "messages" if rows.pool.format.startswith("messages") else "conversations"
    written = [folder / INFO]
    columns = _readable_columns(rows, family)
    if columns is None:
        written.append(folder / COPY)
        _write_copy(rows, folder / COPY)
        entry["file_name"], family, columns = COPY, "messages", {"images": "images"}
    entry["columns"], entry["tags"] = {"messages": family, **columns}, _TAGS[family]
    text = json.dumps({NAME: entry}, indent=2) + "\n"
    write_file(folder / INFO, [text.encode("utf-8")])
    return written


def _readable_columns(rows: PoolRows, family: str) -> dict[str, str] | None:
    """The further columns of the selected file, None if LLaMA-Factory would not read every row of it right.

    JSON is loaded in blocks that must agree in keys and types, so rows must have the same of both.
    """
    if rows.pool.container.kind not in ("json", "jsonl"):
        return None
    tags, found = _TAGS[family], None
    for row in rows:
        value = json.loads(row.raw)
        image_key = next((key for key in ("image", "images") if value.get(key) is not None), None)
        shape = (image_key, tuple(sorted((key, type(item).__name__) for key, item in value.items())))
        found = found or shape
        if shape != found or not _is_readable(row, value, family, tags):
            return None
    if found is None:
        return None
    keys = {key for key, _ in found[1]}
    return {
        **({"images": found[0]} if found[0] else {}),
        **({"system": "system"} if "system" in keys else {}),
    }


def _is_readable(row: Row, value: dict, family: str, tags: Mapping[str, str]) -> bool:
    turns = value[family]
    roles = [turn.get(tags["role_tag"]) for turn in turns]
    contents = [turn.get(tags["content_tag"]) for turn in turns]
    if roles[:1] == [tags["system_tag"]]:
        roles = roles[1:]
    wanted = [tags["assistant_tag"] if i % 2 else tags["user_tag"] for i in range(len(roles))]
    extra = [item for key, item in value.items() if key not in (family, "image", "images")]
    return (
        roles == wanted
        and not row.videos
        and len(roles) % 2 == 0
        and all(set(turn) == {tags["role_tag"], tags["content_tag"]} for turn in turns)
        and all(isinstance(content, str) for content in contents)
        and sum(content.count(IMAGE_MARKER) for content in contents) == len(row.images)
        and not any(isinstance(item, list | dict) for item in extra)
    )


def _write_copy(rows: PoolRows, path: Path) -> None:
    """The rows as parquet with a fixed schema: no block of it can be taken for another type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    embedded = _is_embedded(rows.pool)
    schema = pa.schema(
        [("messages", pa.list_(turn)), ("images", pa.list_(image if embedded else pa.string()))]
    )

    def picture(ref: ImageRef) -> dict[str, Any] | str:
        return {"bytes": encoded_bytes(ref), "path": ref.label} if embedded else _relative(rows.pool, ref)

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as out:
        for group in _groups(_portable(rows), 256):
            records = [
                {"messages": _plain_turns(row), "images": [picture(ref) for ref in row.images]}
                for row in group
            ]
            out.write_table(pa.Table.from_pylist(records, schema))


def _swift(rows: PoolRows, buckets: Mapping[int, str], folder: Path) -> list[Path]:
    if not _is_embedded(rows.pool):
        lines = _swift_lines(rows, buckets, lambda row, ref, index: _relative(rows.pool, ref))
        write_file(folder / SWIFT, lines)
        return [folder / SWIFT]
    with replacing(folder / SWIFT_IMAGES) as images:
        images.mkdir()

        def extract(row: Row, ref: ImageRef, index: int) -> str:
            data = encoded_bytes(ref)
            name = f"{row.row:08d}_{index}{_SUFFIXES.get(data[:2], '.img')}"
            (images / name).write_bytes(data)
            return f"{SWIFT_IMAGES}/{name}"

        write_file(folder / SWIFT, _swift_lines(rows, buckets, extract))
    return [folder / SWIFT, folder / SWIFT_IMAGES]


def _swift_lines(
    rows: PoolRows, buckets: Mapping[int, str], name: Callable[[Row, ImageRef, int], str]
) -> Iterator[bytes]:
    for row in _portable(rows):
        images = [name(row, ref, index) for index, ref in enumerate(row.images)]
        record = {"messages": _plain_turns(row), "images": images, "channel": buckets[row.row]}
        yield json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def _portable(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows that these formats can hold: a text that says `<image>` would be taken for an image.
    Videos are not written."""
    left_out: Counter[str] = Counter()
    for row in rows:
        if row.videos:
            left_out["videos"] += 1
        elif any(IMAGE_MARKER in message.text for message in row.messages):
            left_out[f"`{IMAGE_MARKER}` in their text"] += 1
        else:
            yield row
    for what, count in left_out.items():
        log.warning("%d rows with %s are left out of the copy", count, what)


def _plain_turns(row: Row) -> list[dict[str, str]]:
    """The turns as texts with an `<image>` for each image; a last turn without an answer is dropped."""
    turns = [{"role": m.role, "content": _joined(m)} for m in row.messages]
    return turns[:-1] if turns[-1]["role"] == "user" else turns


def _joined(message: Message) -> str:
    """The turn as one text, with the newline that belongs to a marker between it and a neighbouring text."""
    text = IMAGE_MARKER if message.content and isinstance(message.content[0], Image) else ""
    if not text and message.content:
        text = _words(message.content[0])
    for before, part in pairwise(message.content):
        between = "" if type(before) is type(part) else "\n"
        text += between + (IMAGE_MARKER if isinstance(part, Image) else _words(part))
    return text


def _words(part: object) -> str:
    return part.text if isinstance(part, Text) else ""


def _relative(pool: Pool, ref: ImageRef) -> str:
    """The image's path from the image root."""
    return ref.label if ref.path is None else os.path.relpath(ref.path, os.path.realpath(pool.image_root))


def _is_embedded(pool: Pool) -> bool:
    return pool.container.kind in ("parquet", "arrow", "tar")


def _groups(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
