"""Tables: image columns of every type, large row groups, shards, and folders of `datasets`."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pools import colours, expected_colours, pool_rows, table, write_folder, write_parquet

from vfl_train.data import parquet_files
from vfl_train.data.pool import open_pool
from vfl_train.data.rows import Reason, Rejected
from vfl_train.errors import ConfigError, DataError

ROWS = pool_rows()
CHOSEN = [17, 3, 4, 11]
INPUT_ORDER = [3, 4, 11, 17]


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
