"""R6: 2000 seeded mutations of a good file. Every one is kept or quarantined, and the same on every run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vfl_train.data.check import report
from vfl_train.data.pool import open_pool
from vfl_train.data.readers import read_dataset, write_quarantine, write_selected
from vfl_train.data.survey import Survey

ROWS = 2000
VALUES = [
    None, True, 0, -1, 1e308, 10**4000, "", " ", "x", "\u0000", "\ud800", "\u202e", "<image>", [], {}, [[]],
    [None], {"a": 1}, "../a.png", "/etc/passwd", "http://169.254.169.254/", "data:image/png;base64,AA",
    "device.png", "cut.png", "page.png", "huge.png", "a" * 300, ["a.png", "b.png"], ["a.png", 7],
]  # fmt: skip


def _places(row: object) -> list[tuple]:
    """(container, key) of everything inside a row."""
    found, stack = [], [row]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((node, key))
            stack.append(value)
    return found


def _set(row: dict, rng: random.Random) -> bytes:
    node, key = rng.choice(_places(row))
    node[key] = rng.choice(VALUES)
    return json.dumps(row).encode()


def _delete(row: dict, rng: random.Random) -> bytes:
    node, key = rng.choice(_places(row))
    del node[key]
    return json.dumps(row).encode()


def _extra(row: dict, rng: random.Random) -> bytes:
    keys = ["x", "image", "images", "videos", "messages", "system", "source", "id"]
    row[rng.choice(keys)] = rng.choice(VALUES)
    return json.dumps(row).encode()


def _duplicate_turn(row: dict, rng: random.Random) -> bytes:
    row["conversations"].insert(rng.randrange(3), rng.choice(row["conversations"]))
    return json.dumps(row).encode()


def _bytes(row: dict, rng: random.Random) -> bytes:
    line = bytearray(json.dumps(row, ensure_ascii=False).encode())
    for _ in range(rng.randrange(1, 4)):
        line[rng.randrange(1, len(line))] = rng.choice([0, 0x22, 0x5C, 0x7B, 0x80, 0xC3, 0xED, 0xFF, 0x2C])
    return bytes(line).replace(b"\n", b" ")


def _cut(row: dict, rng: random.Random) -> bytes:
    line = json.dumps(row).encode()
    return line[: rng.randrange(1, len(line))]


def _literal(row: dict, rng: random.Random) -> bytes:
    odd = [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"[" * 3000,
        b"null",
        b'"x"',
        b"[]",
        b"{}",
        b"",
        b"{} {}",
    ]
    choice = rng.choice(odd)
    if rng.random() < 0.5:
        return choice
    return json.dumps(row).encode()[:-1] + b', "x": ' + (choice or b"1") + b"}"


def _long(row: dict, rng: random.Random) -> bytes:
    row["conversations"][-1]["value"] = "x" * rng.choice([10, 100_000, 1_000_001])
    return json.dumps(row).encode()


def _film(row: dict, rng: random.Random) -> bytes:
    row["videos"] = [rng.choices(["a.png", "b.png", "page.png", "no.png"], k=rng.randrange(4))]
    row["conversations"][0]["value"] = "<video>" + row["conversations"][0]["value"]
    return _set(row, rng) if rng.random() < 0.5 else json.dumps(row).encode()


MUTATIONS = [
    _set, _set, _set, _delete, _delete, _extra, _duplicate_turn, _bytes, _bytes, _cut, _literal, _film,
]  # fmt: skip


@pytest.fixture
def mutated(image_root: Path, make_row: Callable, write_jsonl: Callable) -> Path:
    """The fuzzed file: about one row in six is good, ids repeat, one row holds 10 MB."""
    rng = random.Random(6)
    good = (image_root / "a.png").read_bytes()
    (image_root / "cut.png").write_bytes(good[:45])
    (image_root / "page.png").write_bytes(b"<html>")
    Image.new("1", (7200, 7200)).save(image_root / "huge.png")
    (image_root / "device.png").symlink_to("/dev/zero")
    lines = [json.dumps(make_row(0)).encode()]
    for number in range(1, ROWS - 1):
        row = make_row(number % 50, rng.choice(["a.png", "b.png", "sub/c.jpg", None]), answer="dreiß\u00e9")
        if rng.random() < 0.15:
            lines.append(json.dumps(row).encode())
            continue
        mutate = _long if rng.random() < 0.01 else rng.choice(MUTATIONS)
        lines.append(mutate(row, rng))
    lines.append(json.dumps(make_row(1, None, answer="x" * 10_000_000)).encode())
    return write_jsonl(lines)


def test_every_mutated_row_is_kept_or_quarantined(mutated, image_root, tmp_path):
    dataset = read_dataset(mutated, image_root)
    kept, refused = [row.row for row in dataset.rows], [entry.row for entry in dataset.rejected]
    assert dataset.n_read == ROWS and sorted(kept + refused) == list(range(ROWS))
    assert kept == sorted(kept) and refused == sorted(refused)
    assert ROWS // 10 < len(kept) < ROWS // 2
    for entry in dataset.rejected:
        assert entry.id and entry.code and entry.line == entry.row + 1
        assert entry.detail and entry.detail.isprintable() and len(entry.detail) <= 300
        assert str(tmp_path) not in entry.detail
    assert len(dataset.counts()) >= 15

    lines = mutated.read_bytes().split(b"\n")
    assert [row.raw for row in dataset.rows] == [lines[row] for row in kept]
    for name in ("one", "two"):
        again = read_dataset(mutated, image_root)
        write_quarantine(again.rejected, tmp_path / f"{name}.quarantine")
        write_selected(again, again.rows, tmp_path / f"{name}.selected")
        pool = open_pool(mutated, image_root)
        survey = Survey(pool).run(pool.iterate(check_images=True))
        assert survey.rejected == dataset.rejected and survey.n_kept == len(kept)
        (tmp_path / f"{name}.report").write_text("\n".join(report(survey)) + json.dumps(survey.as_dict()))
    for kind in ("quarantine", "selected", "report"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    assert (tmp_path / "one.quarantine").read_bytes().count(b"\n") == len(refused)


def test_the_same_rows_as_an_array_get_the_same_verdicts(mutated, image_root, tmp_path):
    """What is well-formed JSON is judged alike in both containers."""
    from vfl_train.data.records import read_lines

    lines = [r.raw for r in read_lines(mutated) if r.problem is None or r.problem.code == "bad_utf8"]
    sound = [line for line in lines if _is_value(line)]
    (tmp_path / "l.jsonl").write_bytes(b"\n".join(sound))
    (tmp_path / "l.json").write_bytes(b"[" + b",".join(sound) + b"]")
    one = read_dataset(tmp_path / "l.jsonl", image_root, check_images=False)
    two = read_dataset(tmp_path / "l.json", image_root, check_images=False)
    assert len(sound) > ROWS // 2
    assert [row.uid for row in one.rows] == [row.uid for row in two.rows]
    assert [(e.row, e.id, e.code) for e in one.rejected] == [(e.row, e.id, e.code) for e in two.rejected]


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    return True
