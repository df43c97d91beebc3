"""Side files for other trainers, held to what these trainers document (toolkits.md 1.1 and 1.2)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from pools import COLOURS, WRITERS, pool_rows

from vfl_train.data.pool import open_pool
from vfl_train.data_select.emit import EMITS, NAME, emit, hint
from vfl_train.errors import ConfigError

ROWS = [1, 2, 5, 6, 10]
BUCKETS = {row: "ocr" if row % 2 else "language" for row in ROWS}


def pixel(data: object) -> tuple[int, ...]:
    return Image.open(data).convert("RGB").getpixel((0, 0))


def expected_pixels(row: int) -> list[tuple[int, ...]]:
    names = [COLOURS[(row + k) % 4] for k in range(row % 3)]
    return [Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in names]


@pytest.fixture(params=WRITERS)
def selection(request, tmp_path):
    """A pool, and a folder with the selected rows in its format."""
    pool = open_pool(WRITERS[request.param](tmp_path, pool_rows(12)))
    folder = tmp_path / "out"
    folder.mkdir()
    pool.write(ROWS, folder / f"selected{pool.extension}")
    return pool, folder, f"selected{pool.extension}"


def as_llamafactory_reads(folder: Path, media_dir: Path, name: str = NAME) -> list[dict]:
    """Turns and images as LLaMA-Factory's sharegpt converter makes them, with its checks as assertions."""
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    assert info["formatting"] == "sharegpt"
    file = folder / info["file_name"]
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}[file.suffix]
    data = datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    columns, tags = info["columns"], info["tags"]
    assert columns["messages"] in data.column_names and set(columns.values()) <= set(data.column_names)
    read = []
    for example in data:
        turns = example[columns["messages"]]
        system = example.get(columns.get("system", ""), "") or ""
        if turns[0][tags["role_tag"]] == tags["system_tag"]:
            system, turns = turns[0][tags["content_tag"]], turns[1:]
        assert len(turns) % 2 == 0
        for position, turn in enumerate(turns):
            assert turn[tags["role_tag"]] == tags["assistant_tag" if position % 2 else "user_tag"]
        images = example.get(columns.get("images", "")) or []
        images = images if isinstance(images, list) else [images]
        texts = [turn[tags["content_tag"]] for turn in turns]
        assert sum(text.count("<image>") for text in texts) == len(images)
        opened = [pixel(media_dir / i if isinstance(i, str) else io.BytesIO(i["bytes"])) for i in images]
        read.append({"system": system, "texts": texts, "images": opened})
    return read


def test_llamafactory_reads_every_row(selection):
    pool, folder, name = selection
    written = emit("llamafactory", pool, ROWS, BUCKETS, folder, name)
    assert all(path.is_file() for path in written)
    read = as_llamafactory_reads(folder, pool.image_root)
    assert [row["images"] for row in read] == [expected_pixels(row) for row in ROWS]
    assert [row["texts"][1] for row in read] == [f"{row} things" for row in ROWS]
    assert all(len(row["texts"]) == 4 for row in read)
    is_text = pool.container.kind in ("json", "jsonl")
    assert len(written) == (1 if is_text else 2)  # JSON is read as it is, the rest has a copy
    assert f"dataset: {NAME}" in hint("llamafactory", pool, folder)


def test_swift_reads_every_row(selection):
    pool, folder, name = selection
    written = emit("swift", pool, ROWS, BUCKETS, folder, name)
    assert all(path.exists() for path in written)
    lines = (folder / "swift.jsonl").read_text(encoding="utf-8").splitlines()
    root = Path(hint("swift", pool, folder).split()[0].removeprefix("ROOT_IMAGE_DIR="))
    for row, line in zip(ROWS, lines, strict=True):
        record = json.loads(line)
        assert list(record) == ["messages", "images", "channel"] and record["channel"] == BUCKETS[row]
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 2
        assert all(isinstance(m["content"], str) for m in record["messages"])
        assert record["messages"][0]["content"].count("<image>") == len(record["images"]) == row % 3
        assert all(len(path) <= 200 and not path.startswith(("/", "http")) for path in record["images"])
        assert [pixel(root / path) for path in record["images"]] == expected_pixels(row)
    assert "--enable_channel_loss true" in hint("swift", pool, folder)


def llava(number: int, **keys: object) -> dict:
    turns = [{"from": "human", "value": f"<image>\nq{number}"}, {"from": "gpt", "value": "a"}]
    return {"id": f"r{number}", "image": "a.png", "conversations": turns, **keys}


def text(*turns: tuple[str, str], **keys: object) -> dict:
    return {"id": "t", "conversations": [{"from": r, "value": v} for r, v in turns], **keys}


TALK = (("human", "q"), ("gpt", "a"))
ODD = {  # with one of these among them, rows are not what LLaMA-Factory reads right
    "no marker": {**text(*TALK), "image": "a.png"},
    "text only": text(*TALK),
    "other id": llava(1, id=7),
    "further key": llava(1, note="x"),
    "nested key": llava(1, id="n"),
    "other role": {**text(("user", "<image>\nq"), ("assistant", "a")), "image": "a.png"},
    "open end": {**text(("human", "<image>\nq"), ("gpt", "a"), ("human", "r")), "image": "a.png"},
    "several": llava(1, image=["a.png"]),
    "weights": llava(1),
}
ODD["nested key"]["meta"] = {"a": 1}
ODD["weights"]["conversations"][0]["weight"] = 1


@pytest.fixture
def emitted(tmp_path):
    """Emits rows of a JSONL pool for a trainer; returns the files and the folder."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")

    def run(kind: str, rows: list[dict]) -> tuple[list[Path], Path]:
        path = tmp_path / "pool.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pool, folder = open_pool(path), tmp_path / "out"
        folder.mkdir(exist_ok=True)
        numbers = range(len(rows))
        pool.write(numbers, folder / "selected.jsonl")
        return emit(kind, pool, numbers, dict.fromkeys(numbers, "ocr"), folder, "selected.jsonl"), folder

    return run


@pytest.mark.parametrize("odd", ODD)
def test_rows_that_llamafactory_cannot_read_as_they_are_get_a_copy(emitted, tmp_path, odd):
    rows = [llava(0), ODD[odd], llava(2)]
    written, folder = emitted("llamafactory", rows)
    assert [path.name for path in written] == ["dataset_info.json", "llamafactory.parquet"]
    read = as_llamafactory_reads(folder, tmp_path)
    assert [len(row["images"]) for row in read] == [1, 0 if odd == "text only" else 1, 1]
    assert [row["texts"][1] for row in read] == ["a", "a", "a"]
    assert [len(row["texts"]) for row in read] == [2, 2, 2]


def test_rows_alike_are_registered_as_they_are(emitted, tmp_path):
    rows = [llava(i, system="be brief") for i in range(3)]
    written, folder = emitted("llamafactory", rows)
    assert [path.name for path in written] == ["dataset_info.json"]
    entry = json.loads((folder / "dataset_info.json").read_text())[NAME]
    assert entry["file_name"] == "selected.jsonl"
    assert entry["columns"] == {"messages": "conversations", "images": "image", "system": "system"}
    read = as_llamafactory_reads(folder, tmp_path)
    assert [row["system"] for row in read] == ["be brief"] * 3
    assert [row["texts"][0] for row in read] == [f"<image>\nq{i}" for i in range(3)]


@pytest.mark.parametrize("kind", EMITS)
def test_interleaved_images_keep_their_places(emitted, tmp_path, kind):
    parts = [
        {"type": "text", "text": "first"}, {"type": "image"}, {"type": "image"},
        {"type": "text", "text": "last"},
    ]  # fmt: skip
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "a"},
        ],
        "images": ["a.png", "a.png"],
    }
    _, folder = emitted(kind, [row])
    if kind == "swift":
        (record,) = map(json.loads, (folder / "swift.jsonl").read_text().splitlines())
        texts = [m["content"] for m in record["messages"]]
        assert texts == ["s", "first\n<image><image>\nlast", "a"]
    else:
        (record,) = as_llamafactory_reads(folder, tmp_path)
        assert record["system"] == "s" and record["texts"][0] == "first\n<image><image>\nlast"


@pytest.mark.parametrize("kind", EMITS)
def test_a_text_that_says_image_is_left_out_and_said(emitted, tmp_path, kind, caplog):
    """Neither format can hold it: the trainer would look for one more image."""
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what does <image> mean?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
        for content in (parts, "plain")
    ]
    _, folder = emitted(kind, rows)
    assert "1 rows with `<image>` in their text are left out" in caplog.text
    if kind == "swift":
        assert len((folder / "swift.jsonl").read_text().splitlines()) == 1
    else:
        assert len(as_llamafactory_reads(folder, tmp_path)) == 1


def test_unknown_trainers_are_refused(emitted):
    with pytest.raises(ConfigError, match="llamafactory or swift, not axolotl"):
        emitted("axolotl", [llava(0)])


def test_emitting_again_replaces_what_is_there(emitted):
    for rows in ([llava(0), llava(1)], [llava(0)]):
        _, folder = emitted("swift", rows)
    assert len((folder / "swift.jsonl").read_text().splitlines()) == 1
