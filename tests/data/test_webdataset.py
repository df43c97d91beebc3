"""Webdataset shards: how they are named, what is copied, what a sample is."""

from __future__ import annotations

import json
import tarfile

import pytest
from pools import add_member, pool_rows, tar_members, write_tar

from vfl_train.data.pool import open_pool
from vfl_train.data.rows import Reason, Row
from vfl_train.errors import ConfigError

ROWS = pool_rows()


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
