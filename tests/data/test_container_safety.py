"""Hostile containers: damaged files (R6), bad images (R7), paths, links and devices (R8), URLs (R9)."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pools import WRITERS, add_member, png, pool_rows, table, tar_members, write_parquet

from vfl_train.data.pool import open_pool
from vfl_train.data.readers import read_dataset, write_quarantine
from vfl_train.data.rows import Reason, Rejected, Row
from vfl_train.errors import ConfigError, DataError

KINDS = ("parquet", "arrow", "tar")
TURNS = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "a"}]


def write_images(folder: Path, kind: str, images: list[bytes]) -> Path:
    """A pool of one image a row, behind one good row."""
    good = {"id": "good", "messages": TURNS, "images": [{"bytes": png(), "path": "good.png"}]}
    rows = [
        {"id": f"r{i}", "messages": TURNS, "images": [{"bytes": data, "path": f"{i}.png"}]}
        for i, data in enumerate(images)
    ]
    return WRITERS[kind](folder, [good, *rows])


# --- damaged files ----------------------------------------------------------------------------------


def mutated(good: bytes, rng: random.Random) -> bytes:
    """Cut, overwritten with noise, zeros or ones, or with bytes put in."""
    data, at, kind = bytearray(good), rng.randrange(len(good)), rng.randrange(5)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    else:
        end = min(len(data), at + rng.randrange(1, 128))
        data[at:end] = bytes([0 if kind == 3 else 255]) * (end - at)
    return bytes(data)


def outcome(path: Path) -> tuple[str, list[Row | Rejected]]:
    try:
        return "", list(open_pool(path).iterate(check_images=True))
    except (DataError, ConfigError) as error:
        assert "\n" not in str(error) and str(path.parent) in error.message
        return type(error).__name__, []


@pytest.mark.parametrize("kind", KINDS)
def test_every_mutation_is_read_quarantined_or_refused(tmp_path, kind):
    """150 of each: nothing but our own errors, every row counted once, the same on every run."""
    rows, path = pool_rows(9), tmp_path / f"mutated.{kind}"
    if kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(rows).schema) as out:
            out.write_table(table(rows), max_chunksize=4)
    else:
        WRITERS[kind](tmp_path, rows).rename(path)
    good, rng, seen = path.read_bytes(), random.Random(5), Counter()
    for _ in range(150):
        path.write_bytes(mutated(good, rng))
        error, entries = outcome(path)
        assert [entry.row for entry in entries] == list(range(len(entries)))
        assert (error, entries) == outcome(path)
        refused = [entry for entry in entries if isinstance(entry, Rejected)]
        assert all(entry.detail.isprintable() and str(tmp_path) not in entry.detail for entry in refused)
        write_quarantine(refused, tmp_path / "quarantine.jsonl")
        seen[error or ("some" if refused else "all")] += 1
    assert seen["DataError"] > 30 and seen["all"] > 3, seen
    assert kind == "parquet" or seen["some"] > 3, seen  # a damaged page costs parquet its row group


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused_by_name(tmp_path, kind):
    path = WRITERS[kind](tmp_path, pool_rows(9))
    file = sorted(path.glob("*.arrow"))[-1] if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: min(3000, file.stat().st_size - 100)])
    with pytest.raises(DataError, match=file.name) as caught:
        list(open_pool(path).iterate())
    assert "copy" in caught.value.fix


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", [b"weight", b"messages", b"content"])
def test_column_names_that_are_no_text_are_refused(tmp_path, kind, name):
    path = WRITERS[kind](tmp_path, pool_rows(3))
    for file in path.glob("*.arrow") if path.is_dir() else [path]:
        file.write_bytes(file.read_bytes().replace(name, b"\xff\xc3" + name[2:]))
    with pytest.raises(DataError, match="cannot be read as"):
        open_pool(path)


def test_tar_that_lost_its_end_blocks_is_whole_and_one_with_a_broken_header_is_not(tmp_path):
    path = WRITERS["tar"](tmp_path, pool_rows(9))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    end = infos[-1].offset_data + 512 * -(-infos[-1].size // 512)
    path.write_bytes(data[:end])
    assert len(list(open_pool(path).iterate())) == 9
    header = infos[5].offset
    path.write_bytes(data[:header] + b"\x01" * 8 + data[header + 8 :])  # tarfile takes that for the end
    with pytest.raises(DataError, match=f"damaged at byte {header}"):
        list(open_pool(path).iterate())
    path.write_bytes(data[: infos[-1].offset_data + 10])
    with pytest.raises(DataError, match="ends within"):
        list(open_pool(path).iterate())


# --- images -----------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that decodes to width x height."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        size, check = len(body).to_bytes(4, "big"), zlib.crc32(kind + body).to_bytes(4, "big")
        return size + kind + body + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


ZOO = {
    b"": Reason.image_unreadable,
    jpeg()[:700]: Reason.image_truncated,
    png(size=(64, 64))[:60]: Reason.image_truncated,
    b"<html>404</html>": Reason.image_format,
    b'<svg xmlns="http://www.w3.org/2000/svg"/>': Reason.image_format,
    b"%!PS-Adobe-3.0 EPSF-3.0\n": Reason.image_format,
    bomb(12_000, 12_000): Reason.image_too_large,
    bomb(20_000, 20_000): Reason.image_too_large,
    png(size=(1, 10_000)): Reason.image_shape,
    b"\x89PNG\r\n\x1a\n" + bytes(300): Reason.image_unreadable,
}


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_zoo_inside_containers(tmp_path, kind):
    path = write_images(tmp_path, kind, list(ZOO))
    started, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = read_dataset(path)
    assert [row.id for row in dataset.rows] == ["good"]
    assert [entry.code for entry in dataset.rejected] == list(ZOO.values())
    assert time.perf_counter() - started < 0.5 * len(ZOO)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # KiB


@pytest.mark.parametrize("many", [False, True])
def test_missing_bytes_and_path_are_no_image(tmp_path, many):
    nothing = {"bytes": None, "path": None}
    cells = [[nothing], [None]] if many else [nothing, None]
    rows = [{"id": "g", "messages": TURNS, "images" if many else "image": [] if many else None}]
    rows[0]["messages"] = [{"role": "user", "content": "q"}, TURNS[1]]
    rows += [{"id": "r", "messages": TURNS, "images" if many else "image": cell} for cell in cells]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = table(rows).schema.remove_metadata()
    name = "images" if many else "image"
    schema = schema.set(schema.get_field_index(name), pa.field(name, pa.list_(kind) if many else kind))
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "d.parquet")
    good, *bad = open_pool(tmp_path / "d.parquet").iterate()
    assert (
        isinstance(good, Row)
        and [entry.code for entry in bad] == [Reason.wrong_type if many else Reason.image_count_mismatch] * 2
    )


def test_large_values_are_decoded_one_by_one(tmp_path, monkeypatch):
    """A dictionary makes one large value a thousand; the column's size bounds each of them."""
    from vfl_train.data import parquet_files

    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 2**20)
    big = png() + bytes(600_000)
    rows = [{"messages": TURNS, "image": big}] * 40
    small = [{"messages": TURNS, "image": png()}] * 40
    for name, pool in (("big", rows), ("small", small)):
        pq.write_table(
            pa.Table.from_pylist(pool), tmp_path / f"{name}.parquet",
            compression="zstd", dictionary_pagesize_limit=2**30,
        )  # fmt: skip
    assert (tmp_path / "big.parquet").stat().st_size < 10_000
    assert parquet_files._batch_rows(tmp_path / "big.parquet", 0, "image") == 1
    assert parquet_files._batch_rows(tmp_path / "small.parquet", 0, "image") == parquet_files.IMAGE_ROWS
    assert isinstance(open_pool(tmp_path / "big.parquet").row(39), Row)


# --- paths, links, devices, URLs --------------------------------------------------------------------

OUTSIDE, REMOTE, MISSING = Reason.image_outside_root, Reason.remote_image, Reason.image_missing
PATHS = {
    "../secret.png": OUTSIDE,
    "/etc/passwd": OUTSIDE,
    "/dev/zero": OUTSIDE,
    "/proc/self/environ": OUTSIDE,
    "out.png": OUTSIDE,
    "device.png": OUTSIDE,
    "a\0.png": OUTSIDE,
    "pipe.png": Reason.image_not_a_file,
    "none.png": MISSING,
    "http://169.254.169.254/latest/meta-data": REMOTE,
    "https://example.org/a.png": REMOTE,
    "file:///etc/passwd": REMOTE,
    "s3://bucket/a.png": REMOTE,
}


def assert_quiet(events: list[tuple[str, tuple]], root: Path) -> None:
    """No connection, and no file opened but under `root` and Python's own."""
    assert {event for event, _ in events} <= {"open"}
    names = (args[0] for _, args in events if isinstance(args[0], str | bytes | os.PathLike))
    opened = {os.path.realpath(os.fsdecode(name)) for name in names}
    assert {n for n in opened if not n.startswith((f"{root}/", sys.prefix, sys.base_prefix))} == set()


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_paths_in_image_columns_stay_under_the_root(tmp_path, container, audit):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    (root / "a.png").write_bytes(png())
    paths = ["a.png", *PATHS]
    rows = [{"messages": TURNS, "images": [{"bytes": None, "path": path}]} for path in paths]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pool = table(rows).set_column(1, "images", pa.array([row["images"] for row in rows], kind))
    if container == "parquet":
        pq.write_table(pool, root / "d.parquet")
    else:
        with pa.OSFile(str(root / "d.parquet"), "wb") as sink, pa.ipc.new_file(sink, pool.schema) as out:
            out.write_table(pool)
    read_dataset(root / "d.parquet")  # lazy imports open files of their own
    with audit.record("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen") as events:
        dataset = read_dataset(root / "d.parquet")
    assert [row.row for row in dataset.rows] == [0]
    assert {p: e.code for p, e in zip(PATHS, dataset.rejected, strict=True)} == PATHS
    assert_quiet(events, root)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (special("s.png", tarfile.SYMTYPE, "/etc/passwd"), Reason.image_not_a_file),
        (special("s.png", tarfile.SYMTYPE, "good.png"), Reason.image_not_a_file),
        (special("s.png", tarfile.LNKTYPE, "good.png"), Reason.image_not_a_file),
        (special("s.png", tarfile.CHRTYPE), Reason.image_not_a_file),
        (special("s.png", tarfile.BLKTYPE), Reason.image_not_a_file),
        (special("s.png", tarfile.FIFOTYPE), Reason.image_not_a_file),
        (special("/s.png", tarfile.REGTYPE), OUTSIDE),
        (special("../s.png", tarfile.REGTYPE), OUTSIDE),
        (special("x/../../s.png", tarfile.REGTYPE), OUTSIDE),
        (special("x\\..\\s.png", tarfile.REGTYPE), OUTSIDE),
    ],
)
def test_links_devices_and_odd_names_in_tar(tmp_path, info, code, audit):
    row = json.dumps({"id": "s", "messages": TURNS}).encode()
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        add_member(tar, "good.json", row)
        add_member(tar, "good.png", png())
        add_member(tar, info.name.replace(".png", ".json"), row)
        tar.addfile(info)
    read_dataset(tmp_path / "d.tar")
    with audit.record("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen") as events:
        good, bad = open_pool(tmp_path / "d.tar").iterate(check_images=True)
    assert isinstance(good, Row) and bad.code == code
    assert_quiet(events, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.tar"]  # nothing is extracted


@pytest.mark.parametrize("name", ["/etc/passwd", "../good.png", "http://169.254.169.254/", "good.png"])
def test_rows_in_tar_name_members_of_their_own_sample_only(tmp_path, name, audit):
    members = tar_members(pool_rows(2))
    row = json.dumps({"messages": TURNS, "images": [name]}).encode()
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for member, data in [*members, ("good.png", png()), ("s.json", row)]:
            add_member(tar, member, data)
    with audit.record("open", "socket.connect", "socket.getaddrinfo") as events:
        *_, last = open_pool(tmp_path / "d.tar").iterate()
    assert last.code == MISSING
    assert_quiet(events, tmp_path)


def test_tar_sizes_that_lie(tmp_path):
    """A header may claim terabytes; only what is there counts, and nothing is allocated for it."""
    info = tarfile.TarInfo("s.json")
    info.size = 2**43
    path = tmp_path / "d.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"{}" + bytes(510))
    with pytest.raises(DataError, match=r"ends within s\.json"):
        open_pool(path)
    with path.open("wb") as stream:  # a sparse file: the bytes "are there", all of them zero
        info.size = 200 * 1024**2
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(512 + info.size + 1024)
    with pytest.raises(DataError, match=r"none of 1 rows.*bytes"):
        open_pool(path)


def test_parquet_of_another_machine_is_not_unpickled_or_run(tmp_path, audit):
    """Pandas and extension metadata name types; nothing is imported for them."""
    rows = pool_rows(2)
    for row in rows:
        row["images"] = []
        row["messages"][0]["content"] = "q"
    pool = table(rows).replace_schema_metadata(
        {"pandas": '{"index_columns": [{"kind": "os.system"}]}', "huggingface": "os.system"}
    )
    pq.write_table(pool, tmp_path / "d.parquet")
    write_parquet(tmp_path / "warm.parquet", pool_rows(2))
    list(open_pool(tmp_path / "warm.parquet").iterate())
    with audit.record("import", "pickle.find_class", "os.system", "subprocess.Popen") as events:
        assert len(list(open_pool(tmp_path / "d.parquet").iterate())) == 2
    assert not [event for event in events if event[0] != "import"]
