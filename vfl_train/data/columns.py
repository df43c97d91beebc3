"""Rows of an Arrow table (parquet, `datasets` folders): its columns, and images without their bytes.

A row is made of the columns of ROW_COLUMNS that the table has, with the meaning of the same keys in JSON. An
image column holds paths, encoded bytes, or structs of `bytes` and `path` as the `datasets` library writes
them, or lists of one of these. Of a struct the bytes count, and the path where they are null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from vfl_train.data.rows import ImageBytes, ImageRef, one_line
from vfl_train.errors import ConfigError

TURN_COLUMNS = ("conversations", "messages")
IMAGE_COLUMNS = ("image", "images")
VIDEO_COLUMNS = ("video", "videos")
ROW_COLUMNS = (*TURN_COLUMNS, *IMAGE_COLUMNS, *VIDEO_COLUMNS, "id", "system", "source", "dataset")

# Of one image: whether its bytes are in the table, and its path. None for a null.
Entry = tuple[bool, str | None] | None
Shape = Entry | list[Entry]
MakeMember = Callable[[int], ImageBytes]  # from the position in the row's list


def check_columns(schema: pa.Schema, file: Path) -> None:
    """Raises ConfigError if the table is no table of conversations, a name occurs twice, or it holds videos
    themselves."""
    if not any(name in schema.names for name in TURN_COLUMNS):
        shown = one_line(", ".join(schema.names), 120)
        fix = "give it a column `messages` (role and content) or `conversations` (from and value)"
        raise ConfigError(f"{file} has the columns {shown}: no conversations", fix)
    twice = next((name for name in ROW_COLUMNS if schema.names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"{file} has two columns {twice}", "rename one of them")
    for name in VIDEO_COLUMNS:
        if name in schema.names and _holds_bytes(schema.field(name).type):
            fix = "cut the videos into frames and give each row the list of their paths"
            raise ConfigError(f"the column {name} of {file} holds bytes, which are not decoded here", fix)


def decode_names(kind: pa.Schema | pa.DataType) -> None:
    """Look at the name of every column and field. Raises ValueError for one that is no UTF-8."""
    if isinstance(kind, pa.Schema) or types.is_struct(kind):
        for field in kind:
            _ = field.name
            decode_names(field.type)
    elif types.is_map(kind):
        decode_names(kind.key_type)
        decode_names(kind.item_type)
    elif is_list(kind):
        decode_names(kind.value_type)


def embedded_columns(schema: pa.Schema) -> list[str]:
    """The image columns that hold encoded bytes."""
    return [name for name in IMAGE_COLUMNS if name in schema.names and _has_bytes(schema.field(name).type)]


def plain_columns(schema: pa.Schema) -> list[str]:
    """The other columns of a row."""
    embedded = embedded_columns(schema)
    return [name for name in ROW_COLUMNS if name in schema.names and name not in embedded]


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists."""
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def shape_of(scalar: pa.Scalar, has_bytes: bool | None = None) -> Shape:
    """What images a cell of an embedded column holds; no bytes are copied.

    Args:
        has_bytes: what to take for the bytes where the column was read without them.
    """
    if not scalar.is_valid:
        return None
    if is_list(scalar.type):
        return [_entry(item, has_bytes) for item in scalar.values]
    return _entry(scalar, has_bytes)


def image_values(shape: Shape, make: MakeMember) -> object:
    """The value of an image column in a row: paths and references to embedded bytes."""
    if isinstance(shape, list):
        return [_value(entry, position, make) for position, entry in enumerate(shape)]
    return _value(shape, 0, make)


def bytes_at(scalar: pa.Scalar, position: int) -> bytes | None:
    """The encoded bytes of one image of a cell, None where there are none."""
    if scalar.is_valid and is_list(scalar.type):
        values = scalar.values
        scalar = values[position] if position < len(values) else pa.scalar(None)
    if scalar.is_valid and types.is_struct(scalar.type):
        scalar = scalar["bytes"]
    return scalar.as_py() if scalar.is_valid else None


def row_values(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
    """One dictionary a row, of plain columns. Dates and the like become text."""
    return batch.select(list(columns)).to_pylist()


def _has_bytes(kind: pa.DataType) -> bool:
    if is_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    while is_list(kind):
        kind = kind.value_type
    return _has_bytes(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind)


def _entry(scalar: pa.Scalar, has_bytes: bool | None) -> Entry:
    if not scalar.is_valid:
        return None
    if not types.is_struct(scalar.type):
        return (True, None)
    names = [field.name for field in scalar.type]
    path = scalar["path"].as_py() if "path" in names else None
    if has_bytes is None:
        has_bytes = "bytes" in names and scalar["bytes"].is_valid
    return (has_bytes, path if isinstance(path, str) else None)


def _value(entry: Entry, position: int, make: MakeMember) -> str | ImageRef | None:
    if entry is None:
        return None
    has_bytes, path = entry
    if not has_bytes:
        return path
    label = one_line(path, 120) if path else f"image {position}"
    return ImageRef(None, None, label, make(position))
