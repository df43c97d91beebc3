"""Every container: the same rows out of it, by number and in order, and the same written back."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ImageColor
from pools import (
    COLOURS,
    WRITERS,
    add_member,
    pool_rows,
    table,
    tar_members,
    write_folder,
    write_parquet,
    write_tar,
)

from vfl_train.data import parquet_files
from vfl_train.data.images import open_image
from vfl_train.data.pool import Pool, iterate, open_pool
from vfl_train.data.readers import read_dataset, write_selected
from vfl_train.data.rows import Reason, Rejected, Row
from vfl_train.errors import ConfigError, DataError, HubError

ROWS = pool_rows()
CHOSEN = [17, 3, 4, 11]
INPUT_ORDER = [3, 4, 11, 17]


def colours(row: Row) -> list[tuple[int, ...]]:
    return [open_image(ref).getpixel((0, 0)) for ref in row.images]


def expected_colours(number: int) -> list[tuple[int, ...]]:
    return [ImageColor.getrgb(COLOURS[(number + k) % 4]) for k in range(number % 3)]


@pytest.fixture(params=WRITERS)
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    return open_pool(WRITERS[request.param](tmp_path, ROWS))


def test_rows_come_in_order_with_their_images(pool):
    rows = list(pool.iterate(check_images=True))
    assert [row.row for row in rows] == list(range(len(ROWS))) and len(pool) == len(ROWS)
    assert all(isinstance(row, Row) for row in rows)
    assert [row.id for row in rows] == [row["id"] for row in ROWS]
    for row, wanted in zip(rows, ROWS, strict=True):
        assert [m.text for m in row.messages][1:] == [m["content"] for m in wanted["messages"]][1:]
        assert colours(row) == expected_colours(row.row)
    assert len({row.uid for row in rows}) == len(ROWS)
    assert pool.format == f"messages-{pool.container.kind}"


def test_rows_by_number_are_those_in_order(pool):
    rows = list(pool.iterate())
    for number in (13, 2, 19, 0, 5, 13):
        assert pool.row(number) == rows[number]
        assert colours(pool.row(number)) == expected_colours(number)
    assert list(pool.iterate(5, 9)) == rows[5:9] and list(pool.iterate(18)) == rows[18:]
    assert list(pool.iterate(5, 5)) == []
    for number in (len(ROWS), -1):
        with pytest.raises(IndexError):
            pool.row(number)


def test_image_references_survive_pickling(pool):
    """Data loader workers get rows by pickle, under the start method `spawn`."""
    row = pickle.loads(pickle.dumps(pool.row(5)))
    assert colours(row) == expected_colours(5)
    rows = pickle.loads(pickle.dumps(read_dataset(pool.path, pool.image_root).rows))
    assert colours(rows[8]) == expected_colours(8) and rows[5] == row


def test_what_is_written_back_is_what_was_read(pool, tmp_path):
    out = tmp_path / "out" / f"selected{pool.extension}"
    out.parent.mkdir()
    for _ in range(2):  # the second time over the first
        pool.write(CHOSEN, out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    kind, source = pool.container.kind, pool.path
    if kind == "jsonl":
        lines = source.read_bytes().split(b"\n")
        assert out.read_bytes().split(b"\n") == [*(lines[i] for i in INPUT_ORDER), b""]
    elif kind == "json":
        elements = source.read_bytes()[1:-2].split(b" ,\n")
        assert out.read_bytes() == b"[\n" + b",\n".join(elements[i] for i in INPUT_ORDER) + b"\n]\n"
    elif kind == "parquet":
        found, whole = pq.read_table(out), pq.read_table(source)
        assert found.equals(whole.take(INPUT_ORDER), check_metadata=True)
        assert found.schema.metadata[b"note"] == b"kept"
        assert pq.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"
    elif kind == "arrow":
        found, whole = datasets.load_from_disk(out), datasets.load_from_disk(source)
        assert found.features == whole.features
        plain = [d.with_format("arrow")[:] for d in (found, whole.select(INPUT_ORDER))]
        assert plain[0].combine_chunks().equals(plain[1].combine_chunks())
    else:
        with tarfile.open(out) as tar:
            found = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
        assert found == tar_members([ROWS[i] for i in INPUT_ORDER])


def test_selected_rows_are_read_again_by_the_same_reader(pool, tmp_path):
    out = tmp_path / f"selected{pool.extension}"
    pool.write(CHOSEN, out)
    again = read_dataset(out, image_root=pool.image_root)
    assert again.format == pool.format and not again.rejected
    assert [row.id for row in again.rows] == [f"r{i}" for i in INPUT_ORDER]
    assert [colours(row) for row in again.rows] == [expected_colours(i) for i in INPUT_ORDER]
    assert [row.messages for row in again.rows] == [pool.row(i).messages for i in INPUT_ORDER]


def test_nothing_selected_is_written_too(pool, tmp_path):
    pool.write([], tmp_path / f"none{pool.extension}")
    found = tmp_path / f"none{pool.extension}"
    assert found.exists()
    if pool.container.kind != "jsonl":
        with pytest.raises(DataError, match="no rows"):
            open_pool(found)


def test_dataset_is_a_sequence_of_rows_read_on_demand(pool):
    dataset = read_dataset(pool.path, image_root=pool.image_root)
    assert len(dataset.rows) == dataset.n_read == len(ROWS)
    listed = list(dataset.rows)
    assert [dataset.rows[i] for i in (7, 2, -1)] == [listed[7], listed[2], listed[19]]
    assert list(dataset.rows[3:6]) == listed[3:6] and list(dataset.rows[::-1]) == listed[::-1]
    with pytest.raises(IndexError):
        dataset.rows[len(ROWS)]


def test_only_positions_are_kept_in_memory(tmp_path):
    """Growth of Python's own memory over a pool of 8 MB, read three times."""
    import tracemalloc

    row = {"conversations": [{"from": "human", "value": "q" * 4000}, {"from": "gpt", "value": "a"}]}
    line = json.dumps(row).encode() + b"\n"
    path = tmp_path / "large.jsonl"
    path.write_bytes(line * 2_000)
    tracemalloc.start()
    try:
        pool = open_pool(path)
        for _ in range(2):
            assert sum(1 for _ in pool.iterate()) == 2_000
        pool.write(range(0, 2_000, 2), tmp_path / "half.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000


def test_iterate_is_the_one_line_form(tmp_path):
    path = WRITERS["parquet"](tmp_path, ROWS)
    assert [row.id for row in iterate(path, limit=3)] == ["r0", "r1", "r2"]


# --- parquet and arrow ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (pa.binary(), lambda b, p: b),
        (pa.large_binary(), lambda b, p: b),
        (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), lambda b, p: {"bytes": b, "path": p}),
        (pa.struct([("bytes", pa.binary())]), lambda b, p: {"bytes": b}),
        (pa.string(), lambda b, p: p),
    ],
    ids=["binary", "large binary", "struct", "struct of bytes", "path"],
)
@pytest.mark.parametrize("many", [False, True], ids=["image", "images"])
@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_image_columns_of_every_type(tmp_path, kind, cell, many, container):
    rows = [row for row in ROWS if len(row["images"]) < 2]
    for row in rows:
        for image in row["images"]:
            (tmp_path / image["path"]).write_bytes(image["bytes"])
    images = [[cell(i["bytes"], i["path"]) for i in row["images"]] for row in rows]
    name = "images" if many else "image"
    values = images if many else [(found or [None])[0] for found in images]
    columns = {
        "messages": [row["messages"] for row in rows],
        name: pa.array(values, pa.list_(kind) if many else kind),
    }
    path = tmp_path / f"pool.{container}"
    if container == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=4)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.table(columns).schema) as out:
            out.write_table(pa.table(columns), max_chunksize=5)
    found = list(open_pool(path).iterate(check_images=True))
    assert [colours(row) for row in found] == [expected_colours(int(row["id"][1:])) for row in rows]


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_bytes_count_and_paths_stand_in_where_they_are_null(tmp_path, container):
    """As `datasets` writes images that were never embedded, in one row group with embedded ones."""
    rows = [row for row in ROWS if len(row["images"]) == 1]
    for row in rows[::2]:
        (tmp_path / row["images"][0]["path"]).write_bytes(row["images"][0]["bytes"])
    mixed = [
        {**row, "images": [{**row["images"][0], "bytes": None}]} if i % 2 == 0 else row
        for i, row in enumerate(rows)
    ]
    path = tmp_path / f"pool.{container}"
    if container == "parquet":
        write_parquet(path, mixed)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table(mixed).schema) as out:
            out.write_table(table(mixed))
    found = list(open_pool(path).iterate(check_images=True))
    assert [row.images[0].path is not None for row in found] == [i % 2 == 0 for i in range(len(rows))]
    assert [colours(row) for row in found] == [expected_colours(int(row["id"][1:])) for row in rows]


def test_parquet_images_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """One row group of 400 rows: rows in order decode each of them once, whatever the order of opening."""
    from vfl_train.data import parquet_files

    path = write_parquet(tmp_path / "one.parquet", pool_rows(400), group=400)
    decoded = []
    plain = parquet_files._Cursor._restart
    monkeypatch.setattr(
        parquet_files._Cursor, "_restart", lambda self: (decoded.append(self.leaf), plain(self))[1]
    )
    for row in open_pool(path).iterate(check_images=True):
        assert colours(row) == expected_colours(row.row)
    assert len(decoded) <= 3  # check and reading are a batch or two apart
    assert parquet_files._Cursor(path, 0, "images.list.element.bytes").recent.maxlen * 16 < 400


def test_a_large_row_group_is_gone_through_once(tmp_path, monkeypatch):
    """`select` reads a block at a time, each process its own, and some rows by number."""
    file = write_parquet(tmp_path / "pool.parquet", pool_rows(90), group=90)
    values, passes = parquet_files.ParquetShards._values, []
    monkeypatch.setattr(
        parquet_files.ParquetShards,
        "_values",
        lambda self, index: passes.append(index) or values(self, index),
    )
    monkeypatch.setattr(parquet_files, "KEPT_ROWS", 20)

    def names(rows):
        return [row.id for row in rows]

    pool = open_pool(file)
    passes.clear()
    found = [names(pool.iterate(start, start + 10)) for start in range(0, 90, 10)]
    assert found == [[f"r{i}" for i in range(start, start + 10)] for start in range(0, 90, 10)]
    assert len(passes) == 1
    assert names(pool.row(number) for number in (3, 50, 89)) == ["r3", "r50", "r89"] and len(passes) == 2
    every_other = [names(pool.iterate(start, start + 10)) for start in (10, 30, 50)]
    assert every_other == [[f"r{i}" for i in range(start, start + 10)] for start in (10, 30, 50)]
    assert len(passes) == 3
    assert pool.row(7).id == "r7", "back again, from the beginning"
    started = pool.iterate(20, 40)
    assert next(started).id == "r20" and names(pool.iterate(20, 22)) == ["r20", "r21"]
    assert names(started) == [f"r{i}" for i in range(21, 40)], (
        "two that read at once do not take each other's"
    )


def test_shards_are_read_as_one(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for shard, rows in enumerate((ROWS[:7], ROWS[7:8], ROWS[8:])):
        write_parquet(folder / f"train-{shard:05d}-of-00003.parquet", rows)
    (tmp_path / "set" / "README.md").write_text("a data set")
    pool = open_pool(tmp_path / "set")
    assert [row.id for row in pool.iterate()] == [row["id"] for row in ROWS]
    pool.write(CHOSEN, tmp_path / "selected.parquet")
    assert pq.read_table(tmp_path / "selected.parquet").equals(table(ROWS).take(INPUT_ORDER))
    other = open_pool(f"{folder}/train-*-of-00003.parquet")
    assert other.sha256 == pool.sha256 and len(other) == len(ROWS)
    write_parquet(folder / "test-00000-of-00001.parquet", ROWS[:2])
    with pytest.raises(ConfigError, match="splits test, train") as caught:
        open_pool(tmp_path / "set")
    assert "train" in caught.value.fix


def test_shards_of_other_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "a-0.parquet", ROWS[:3])
    write_parquet(tmp_path / "a-1.parquet", [{**row, "new": 1} for row in ROWS[:3]])
    with pytest.raises(ConfigError, match=r"a-1\.parquet has other columns"):
        open_pool(tmp_path / "a-*.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "image": [b""]}, "no conversations"),
        ({"messages": ["text"]}, "none of 1 rows"),
        ({"messages": [[1]]}, "none of 1 rows"),
        ({"conversations": [None]}, "none of 1 rows"),
    ],
)
def test_tables_of_something_else(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    with pytest.raises((ConfigError, DataError), match=message):
        open_pool(tmp_path / "d.parquet")


def test_wrong_column_types_cost_rows_not_the_run(tmp_path):
    rows = [{"messages": row["messages"], "images": [1, 2]} for row in ROWS[:3]]
    write_parquet(tmp_path / "d.parquet", [*rows])
    with pytest.raises(DataError, match="none of 3 rows"):
        open_pool(tmp_path / "d.parquet")
    columns = {"messages": [row["messages"] for row in ROWS[:3]], "image": [None, "a.png", None]}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    codes = [e.code if isinstance(e, Rejected) else "" for e in open_pool(tmp_path / "e.parquet").iterate()]
    assert codes[1] == Reason.image_count_mismatch or codes[1] == Reason.image_missing


# --- datasets folders -------------------------------------------------------------------------------


def test_a_dict_of_splits_wants_one_of_them(tmp_path):
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(ROWS[:3]) for name in ("train", "test")}
    ).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"several splits \(test, train\)") as caught:
        open_pool(tmp_path / "both")
    assert str(tmp_path / "both" / "test") in caught.value.fix
    assert len(open_pool(tmp_path / "both" / "train")) == 3


@pytest.mark.parametrize("name", ["../other/data.arrow", "/etc/passwd", "", "..", "a\0b", None, "link.arrow"])
def test_a_state_that_names_files_elsewhere_is_refused(tmp_path, name, audit):
    folder = write_folder(tmp_path / "saved", ROWS[:3])
    write_folder(tmp_path / "other", ROWS[:3])
    (folder / "link.arrow").symlink_to(next((tmp_path / "other").glob("*.arrow")))
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with audit.record("open") as events, pytest.raises(DataError, match=r"state\.json|leads out"):
        open_pool(folder)
    assert not [args[0] for _, args in events if "other" in str(args[0]) or "passwd" in str(args[0])]


# --- webdataset -------------------------------------------------------------------------------------


def test_tar_shards_by_braces_pattern_and_folder(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"pool-{shard:03d}.tar", ROWS[shard * 7 : shard * 7 + 7])
    wanted = [row["id"] for row in ROWS]
    for name in ("pool-{000..002}.tar", "pool-*.tar", "pool-{000,001,002}.tar", ""):
        assert [row.id for row in open_pool(tmp_path / name).iterate()] == wanted, name
    with pytest.raises(ConfigError, match=r"there is no file .*pool-003\.tar"):
        open_pool(tmp_path / "pool-{000..003}.tar")
    with pytest.raises(ConfigError, match="names 10000000"):
        open_pool(tmp_path / "pool-{0..9999999}.tar")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_their_headers_are_copied(tmp_path, form):
    rows = [{**row, "id": "ü" * 60 + row["id"] + "x" * 60} for row in ROWS[:5]]
    pool = open_pool(write_tar(tmp_path / "long.tar", rows, form))
    pool.write([1, 3], tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert tar.getnames() == [name for name, _ in tar_members([rows[1], rows[3]])]
    assert [row.id for row in open_pool(tmp_path / "out.tar").iterate()] == [rows[1]["id"], rows[3]["id"]]


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("members", "code", "images"),
    [
        ({"s.json": {"conversations": TURNS}, "s.png": b""}, None, 1),  # LLaVA: the image opens the turn
        ({"s.json": {"conversations": TURNS, "image": "s.png"}, "s.png": b""}, None, 1),
        ({"s.json": {"conversations": TURNS, "image": "png"}, "s.png": b"", "s.jpg": b""}, None, 1),
        ({"s.json": {"conversations": TURNS, "image": "x.png"}, "s.png": b""}, Reason.image_missing, 0),
        ({"s.json": {"conversations": TURNS, "image": "../s.png"}, "s.png": b""}, Reason.image_missing, 0),
        ({"s.json": {"conversations": TURNS, "image": "/etc/passwd"}}, Reason.image_missing, 0),
        ({"s.json": {"conversations": TURNS}, "s.txt": b"caption"}, None, 0),
        ({"s.png": b""}, Reason.missing_key, 0),
        ({"s.json": {"conversations": TURNS}, "s.a.json": {}}, None, 0),
        ({"s.json": [], "s.png": b""}, Reason.not_an_object, 0),
        ({"s.json": b"\xff{}"}, Reason.bad_utf8, 0),
        ({"s.json": b"{"}, Reason.bad_json, 0),
        ({"s.json": {"messages": 1, "conversations": 1}}, Reason.ambiguous_keys, 0),
    ],
)
def test_samples(tmp_path, members, code, images):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        add_member(tar, "good.json", json.dumps({"conversations": TURNS}).encode())
        for name, value in members.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            add_member(tar, name, data or b"not looked at")
    good, entry = open_pool(tmp_path / "d.tar").iterate()
    assert isinstance(good, Row) and entry.id == ("s" if code is None else entry.id)
    if code is None:
        assert len(entry.images) == images
    else:
        assert entry.code == code and entry.line is None


def test_two_rows_in_a_sample_are_refused(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name in ("g.json", "s.json", "s.json"):
            add_member(tar, name, json.dumps({"conversations": TURNS}).encode())
    assert [getattr(e, "code", None) for e in open_pool(tmp_path / "d.tar").iterate()] == [
        None,
        Reason.ambiguous_keys,
    ]


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("d.jsonl.gz", b"\x1f\x8b\x08", "gunzip"),
        ("d.tar.gz", b"\x1f\x8b\x08", "give the .tar"),
        ("d.jsonl", b"\x1f\x8b\x08", "gunzip"),
        ("d.zip", b"PK\x03\x04", "unzip"),
        ("d.csv", b"a,b\n1,2\n", "convert it to JSONL"),
        ("d.tsv", b"a\tb\n", "convert it to JSONL"),
        ("d.parquet", b"{}\n", "copy it again"),
        ("d.json.zst", b"\x28\xb5\x2f\xfd", "unzstd"),
    ],
)
def test_packed_files_and_tables_of_text_are_refused_with_the_fix(tmp_path, name, content, fix):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_pool(tmp_path / name)
    assert fix in caught.value.fix and name in caught.value.message and "\n" not in str(caught.value)


def test_content_counts_not_the_name(tmp_path):
    write_parquet(tmp_path / "d.json", ROWS[:2])
    assert open_pool(tmp_path / "d.json").format == "messages-parquet"


def test_folders_that_could_mean_several_things(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="holds no data file"):
        open_pool(empty)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_parquet(mixed / "a.parquet", ROWS[:2])
    write_tar(mixed / "b.tar", ROWS[:2])
    with pytest.raises(ConfigError, match=r"holds 1 \.parquet, 1 \.tar files") as caught:
        open_pool(mixed)
    assert "*.parquet" in caught.value.fix
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (texts / name).write_text('{"conversations": []}\n')
    with pytest.raises(ConfigError, match="cannot be read as one"):
        open_pool(texts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "tar"])
def test_files_that_change_while_they_are_read(tmp_path, kind):
    path = WRITERS[kind](tmp_path, ROWS)
    dataset = read_dataset(path)
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    if kind == "jsonl":
        file.write_bytes(file.read_bytes() + b"\n")
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(DataError):
        write_selected(dataset, [dataset.rows[2], dataset.rows[13]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the Hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one data set of the Hub, and no connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    storage = tmp_path / "cache" / "datasets--lab--pool"
    snapshot = storage / "snapshots" / ("a" * 40)
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text("a" * 40)
    (snapshot / "data").mkdir(parents=True)
    (storage / "blobs").mkdir()
    return snapshot


def link(snapshot: Path, name: str, content: bytes) -> None:
    """A file as the Hub's cache keeps it: a link to a blob."""
    blob = snapshot.parent.parent / "blobs" / name.replace("/", "-")
    blob.write_bytes(content)
    (snapshot / name).symlink_to(blob)


def test_data_sets_of_the_hub(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link(hub_cache, "data/train-00000-of-00001.parquet", write_parquet(tmp_path / "x", ROWS).read_bytes())
    for name in ("lab/pool", "hub:lab/pool", "hub:lab/pool@main", "hub:lab/pool/data/train-*.parquet"):
        pool = open_pool(name)
        assert [row.id for row in pool.iterate(check_images=True)] == [row["id"] for row in ROWS], name
    with pytest.raises(ConfigError, match="has no file data/test"):
        open_pool("hub:lab/pool/data/test-*.parquet")
    with pytest.raises(HubError, match="cannot be reached"):
        open_pool("lab/nothing")


def test_images_of_a_snapshot_are_links_to_blobs(hub_cache, tmp_path):
    line = json.dumps({"messages": ROWS[1]["messages"], "images": ["data/a.png"]}).encode()
    link(hub_cache, "rows.jsonl", line)
    link(hub_cache, "data/a.png", ROWS[1]["images"][0]["bytes"])
    (tmp_path / "secret.png").write_bytes(ROWS[1]["images"][0]["bytes"])
    (row,) = open_pool("hub:lab/pool").iterate(check_images=True)
    assert isinstance(row, Row) and colours(row) == expected_colours(1)
    (hub_cache / "data" / "a.png").unlink()
    (hub_cache / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    (row,) = open_pool("hub:lab/pool").iterate()
    assert row.code == Reason.image_outside_root
