"""One small pool of conversations in every container, as the usual tools write it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageColor

from vfl_train.data.images import open_image
from vfl_train.data.rows import Row

COLOURS = ("red", "lime", "blue", "white")
METADATA = {"huggingface": '{"info": {}}', "note": "kept"}


def png(colour: str = "red", size: tuple[int, int] = (16, 12)) -> bytes:
    """A one-coloured PNG file."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def pool_rows(count: int = 20) -> list[dict]:
    """Rows with 0, 1 or 2 images in turn, of two answers each."""
    return [
        {
            "id": f"r{i}",
            "images": [{"bytes": png(COLOURS[(i + k) % 4]), "path": f"{i}-{k}.png"} for k in range(i % 3)],
            "messages": [
                {"role": "user", "content": "<image>\n" * (i % 3) + f"how many {i}?"},
                {"role": "assistant", "content": f"{i} things"},
                {"role": "user", "content": "sure?"},
                {"role": "assistant", "content": "yes"},
            ],
            "weight": i / 7,  # a column that is no part of a row, and must survive
        }
        for i in range(count)
    ]


def colours(row: Row) -> list[tuple[int, ...]]:
    """The colour of each image of a row as a container gives it."""
    return [open_image(ref).getpixel((0, 0)) for ref in row.images]


def expected_colours(number: int) -> list[tuple[int, ...]]:
    """What `colours` must find in row `number` of `pool_rows`."""
    return [ImageColor.getrgb(COLOURS[(number + k) % 4]) for k in range(number % 3)]


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows).replace_schema_metadata(METADATA)


def write_parquet(path: Path, rows: list[dict], group: int = 6) -> Path:
    pq.write_table(table(rows), path, row_group_size=group, compression="zstd")
    return path


def write_folder(path: Path, rows: list[dict]) -> Path:
    """What `datasets.Dataset.save_to_disk` writes, in two shards."""
    import datasets

    found = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    found.save_to_disk(path, num_shards=2)
    return path


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_members(rows: Iterable[dict]) -> list[tuple[str, bytes]]:
    """Names and contents of a webdataset shard."""
    members = []
    for row in rows:
        value = {key: row[key] for key in ("id", "messages")}
        members.append((f"pool/{row['id']}.json", json.dumps(value).encode()))
        members += [(f"pool/{row['id']}.{k}.png", image["bytes"]) for k, image in enumerate(row["images"])]
    return members


def write_tar(path: Path, rows: Iterable[dict], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in tar_members(rows):
            add_member(tar, name, data)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """The same rows with their images as files beside it."""
    for row in rows:
        for image in row["images"]:
            (path.parent / image["path"]).write_bytes(image["bytes"])
    plain = [{**row, "images": [image["path"] for image in row["images"]]} for row in rows]
    lines = [json.dumps(row, separators=(",", ": ")).encode() for row in plain]
    if path.suffix == ".json":
        path.write_bytes(b"[" + b" ,\n".join(lines) + b"]\n")
    else:
        path.write_bytes(b"\n".join(lines) + b"\n")
    return path


WRITERS: dict[str, Callable[[Path, list[dict]], Path]] = {
    "jsonl": lambda folder, rows: write_jsonl(folder / "pool.jsonl", rows),
    "json": lambda folder, rows: write_jsonl(folder / "pool.json", rows),
    "parquet": lambda folder, rows: write_parquet(folder / "pool.parquet", rows),
    "arrow": lambda folder, rows: write_folder(folder / "saved", rows),
    "tar": lambda folder, rows: write_tar(folder / "pool.tar", rows),
}
