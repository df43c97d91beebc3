"""Every container: the same rows out of it, by number and in order, and the same written back."""

from __future__ import annotations

import json
import pickle  # allow: data loader workers spawn by it
import tarfile
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from pools import WRITERS, colours, expected_colours, pool_rows, tar_members, write_parquet, write_tar

from vfl_train.data.pool import Pool, iterate, open_pool
from vfl_train.data.readers import read_dataset, write_selected
from vfl_train.data.rows import Reason, Row
from vfl_train.errors import ConfigError, DataError, HubError

ROWS = pool_rows()
CHOSEN = [17, 3, 4, 11]
INPUT_ORDER = [3, 4, 11, 17]


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


@pytest.mark.parametrize("kind", WRITERS)
def test_the_output_of_select_is_the_rows_that_it_picked(tmp_path, kind):
    """In the format they came in, not its table of scores."""
    pool = open_pool(WRITERS[kind](tmp_path, ROWS))
    folder = tmp_path / "select"
    folder.mkdir()
    write_parquet(folder / "scores.parquet", ROWS)
    name = f"selected{pool.extension}"
    pool.write(CHOSEN, folder / name)
    (folder / "selection.json").write_text(json.dumps({"selected": name}))
    found = open_pool(folder, image_root=pool.image_root)
    assert found.path == folder / name and found.format == pool.format
    assert [row.id for row in found.iterate(check_images=True)] == [f"r{i}" for i in INPUT_ORDER]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"selected": 1}', '{"selected": ""}',
                                  '{"selected": "../pool.jsonl"}', '{"selected": ".."}'])  # fmt: skip
def test_a_selection_that_names_no_file_of_its_own_is_none(tmp_path, text):
    WRITERS["jsonl"](tmp_path, ROWS[:2])
    folder = tmp_path / "select"
    folder.mkdir()
    (folder / "selection.json").write_text(text)
    with pytest.raises((ConfigError, DataError)):
        open_pool(folder)


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
