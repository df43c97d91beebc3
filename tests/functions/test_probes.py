"""Probe folders: what is read, what is refused, and that counts add up."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from vfl_train.config import ProbesConfig
from vfl_train.data.rows import ImageRef
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.check import check_probes
from vfl_train.functions.probes import BadPair, builtin_probe_set, load_probe_set, save_probe_set, scan

GOOD = {
    "function": "ocr", "image_a": "a.png", "image_b": "b.png",
    "question": "what?", "answer_a": "x", "answer_b": "y",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, size, color in (("a.png", 16, "red"), ("b.png", 16, "blue"), ("large.png", 24, "red")):
        Image.new("RGB", (size, size), color).save(tmp_path / name)
    return tmp_path


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "pairs.jsonl").write_text(text + "\n")


def test_good_pairs_are_grouped_by_function(folder):
    write(folder, GOOD, {**GOOD, "function": "my_function2"}, GOOD)
    probes = load_probe_set(folder)
    assert {name: len(pairs) for name, pairs in probes.pairs.items()} == {"ocr": 2, "my_function2": 1}
    assert load_probe_set(folder, ["ocr"], limit=1).pairs.keys() == {"ocr"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**GOOD, "image_b": "large.png"}, "a.png is 16 x 16 and large.png is 24 x 24 .*sizes must be equal"),
        ({**GOOD, "image_b": "a.png"}, "same pixels"),
        ({**GOOD, "image_b": "missing.png"}, "missing.png"),
        ({**GOOD, "image_b": "../b.png"}, "image"),
        ({**GOOD, "image_b": "http://example.org/b.png"}, "image"),
        ({**GOOD, "question": ""}, "question"),
        ({**GOOD, "answer_b": " X."}, "same answer"),
        ({**GOOD, "answer_a": "no", "answer_b": "no 5", "match": "choice"}, "same answer"),
        ({**GOOD, "answer_a": "no 5", "answer_b": "no", "match": "choice"}, "same answer"),
        ({**GOOD, "answer_b": "?!"}, "no letter and no digit"),
        ({**GOOD, "answer_a": "1,2,3,4", "match": "iou"}, "answer_b is no box"),
        ({**GOOD, "answer_a": "0,0,9,9", "answer_b": "0,0,9,8", "match": "iou"}, "same answer"),
        ({**GOOD, "question": "\ud800?"}, "surrogate"),
        (json.dumps(GOOD)[:-1] + ', "answer_b": "z"}', "twice"),
        (json.dumps(GOOD)[:-1] + ', "x": ' + "9" * 5000 + "}", "JSON"),
        ("[" * 100_000, "JSON"),
        ({**GOOD, "function": "OCR"}, "function name"),
        ({**GOOD, "function": "language"}, "function name"),
        ({**GOOD, "match": "fuzzy"}, "match"),
        ("[1, 2]", "object"),
        ("{", "JSON"),
    ],
    ids=str,
)
def test_a_bad_pair_refuses_the_set_and_names_its_line(folder, line, reason):
    write(folder, GOOD, line)
    with pytest.raises(DataError, match=f"line 2: .*{reason}") as caught:
        load_probe_set(folder)
    assert "probes check" in caught.value.fix


def test_pairs_of_a_folder_are_decoded_at_access_and_not_held(folder):
    write(folder, GOOD, {**GOOD, "function": "count"}, GOOD)
    probes = load_probe_set(folder, ["ocr"], limit=1)
    assert probes.available == {"ocr": 2} and len(probes.pairs["ocr"]) == 1
    (loaded,) = probes.pairs["ocr"]
    assert isinstance(loaded.source_a, ImageRef) and isinstance(loaded.source_b, ImageRef)
    assert loaded.image_a is not loaded.image_a and loaded.image_a.getpixel((0, 0)) == (255, 0, 0)
    assert loaded.image_b.getpixel((0, 0)) == (0, 0, 255)
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png is not there"):
        assert loaded.image_b


def test_the_sha256_is_that_of_the_file_and_of_every_image(folder):
    write(folder, GOOD, {**GOOD, "function": "count", "image_a": "b.png", "image_b": "a.png"})
    red, blue = (Image.open(folder / name).convert("RGB").tobytes() for name in ("a.png", "b.png"))
    wanted = hashlib.sha256((folder / "pairs.jsonl").read_bytes() + red + blue + blue + red).hexdigest()
    assert load_probe_set(folder).sha256 == load_probe_set(folder, ["ocr"], limit=1).sha256 == wanted


def test_a_set_has_the_name_of_its_folder(folder, monkeypatch):
    write(folder, GOOD)
    monkeypatch.chdir(folder)
    assert load_probe_set(Path(".")).name == folder.name


def test_unknown_function_and_missing_file_are_config_errors(folder):
    write(folder, GOOD)
    with pytest.raises(ConfigError, match="count"):
        load_probe_set(folder, ["count"])
    with pytest.raises(ConfigError, match=r"pairs\.jsonl"):
        load_probe_set(folder / "nowhere")


# --- a thousand mutated lines ------------------------------------------------------------------------

# Values that no text key may have, as JSON.
WRONG_VALUES = [
    "null", "7", "1e999", "-1" + "0" * 5000, "NaN", "true", "[]", "{}", '["a.png"]', '""', '" \\t "',
    '"\\ud800"', "[" * 50_000, '{"a":' * 50_000,
]  # fmt: skip
WRONG_PATHS = [
    "../a.png", "sub/../../a.png", "/etc/passwd", "\\\\server\\a.png", "C:\\a.png", "file:///a.png",
    "https://example.org/a.png", "data:image/png;base64,AAAA", "missing.png", ".", "sub", "sub/",
    "a.png/b.png", "a.png\0", "\0", "x" * 300 + ".png", "x" * 5000, "link-out.png", "link-loop.png",
    "text.png", "empty.png", "cut.png", "broken.png", "bomb.png", "pairs.jsonl", "large.png", "fifo",
    "~/a.png", "a.png ",
]  # fmt: skip
WRONG_LINES = [
    b"null", b"0", b'"text"', b"[]", b"{}", b"[" * 100_000, b'{"function":' * 50_000, b"\xff\xfe", b"\x00",
    b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), json.dumps(GOOD).encode("utf-16").replace(b"\n", b""),
    json.dumps(GOOD).encode() * 2, b"9" * 10_000, b"{" + b'"a":1,' * 1000, b"\x1b[2J\x1b]0;title\x07",
]  # fmt: skip


def hostile_files(folder):
    """What the wrong paths lead to."""
    (folder / "sub").mkdir()
    (folder / "link-out.png").symlink_to("/etc/passwd")
    (folder / "link-loop.png").symlink_to("link-loop.png")
    os.mkfifo(folder / "fifo")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    good = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "broken.png").write_bytes(good[:40] + b"\x55" * 20 + good[60:])
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(bomb + good[33:])


def with_raw(key, value):
    """The good line with `value` (JSON text) as the value of `key`."""
    return (json.dumps({**GOOD, key: "@"}).replace('"@"', value)).encode()


def mutated(rng):
    """(a line without line breaks, whether it must be refused; None where either may be right)."""
    text, key = json.dumps(GOOD).encode(), rng.choice(list(GOOD))
    at, image = rng.randrange(len(text)), rng.choice(("image_a", "image_b"))
    return rng.choice(
        [
            lambda: (text, False),
            lambda: (json.dumps({**GOOD, "note": ["x"], "number": 1e300}).encode(), False),
            lambda: (b" " + text + b"\r", False),
            lambda: (text[:at], True),
            lambda: (text[:at] + bytes([rng.randrange(256)]).replace(b"\n", b"") + text[at + 1 :], None),
            lambda: (text[:at] + rng.randbytes(3).replace(b"\n", b"") + text[at:], None),
            lambda: (text[:at] + text[at + rng.randrange(1, 20) :], None),
            lambda: (text[:at] + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80"]) + text[at:], True),
            lambda: (text[:at] + b"\x00" + text[at:], True),
            lambda: (json.dumps({k: v for k, v in GOOD.items() if k != key}).encode(), True),
            lambda: (json.dumps({(k.upper() if k == key else k): v for k, v in GOOD.items()}).encode(), True),
            lambda: (text[:-1] + f', "{key}": "z"}}'.encode(), True),
            lambda: (with_raw(key, rng.choice(WRONG_VALUES)), True),
            lambda: (json.dumps({**GOOD, image: rng.choice(WRONG_PATHS)}).encode(), True),
            lambda: (
                json.dumps({**GOOD, "match": rng.choice(["", "fuzzy", None, 3, ["exact"]])}).encode(),
                True,
            ),
            lambda: (json.dumps({**GOOD, "match": "iou"}).encode(), True),
            lambda: (
                json.dumps({**GOOD, "function": rng.choice(["OCR", "ocr\n", "", "\u043ecr"])}).encode(),
                True,
            ),
            lambda: (
                json.dumps({**GOOD, "answer_b": rng.choice(["x", " X.", "...", "\u3000"])}).encode(),
                True,
            ),
            lambda: (rng.choice(WRONG_LINES), True),
        ]
    )()


def test_counts_of_a_thousand_mutated_lines_add_up(folder, capsys):
    hostile_files(folder)
    rng = random.Random(0)
    drawn = [mutated(rng) for _ in range(1000)]
    refused = {number: wrong for number, (line, wrong) in enumerate(drawn, 1) if line.strip()}
    (folder / "pairs.jsonl").write_bytes(b"\n".join(line for line, _ in drawn) + b"\n\n  \n")

    found = list(scan(folder))
    assert [p.line for p in found] == list(refused)
    bad = {p.line: p.reason for p in found if isinstance(p, BadPair)}
    for number, wrong in refused.items():
        assert wrong in (None, number in bad), drawn[number - 1][0][:300]
    assert all(reason.strip() and reason.isprintable() and len(reason) <= 300 for reason in bad.values())
    assert 500 < len(bad) < len(found) - 100

    with pytest.raises(DataError, match=f"{len(bad)} of {len(found)} pairs"):
        check_probes(ProbesConfig(action="check", folder=folder))
    *lines, total = capsys.readouterr().out.splitlines()
    assert total == f"{len(found)} pairs = {len(found) - len(bad)} usable + {len(bad)} unusable"
    assert [line for line in lines if line.startswith("line ")] == [f"line {n}: {r}" for n, r in bad.items()]
    with pytest.raises(DataError, match=rf"pairs\.jsonl line {min(bad)}: "):
        load_probe_set(folder)


@pytest.mark.parametrize("path", WRONG_PATHS, ids=lambda p: repr(p[:30]))
def test_no_image_outside_the_folder_and_no_broken_one(folder, path):
    hostile_files(folder)
    write(folder, {**GOOD, "image_b": path})
    (found,) = scan(folder)
    assert isinstance(found, BadPair) and str(folder) not in found.reason


def test_a_saved_set_is_read_back(tmp_path):
    probes = builtin_probe_set(("count", "ocr"), 3, 0, world="phantom")
    save_probe_set(probes, tmp_path)
    again = load_probe_set(tmp_path)
    assert [[p.pair for p in pairs] for pairs in again.pairs.values()] == [
        [p.pair for p in pairs] for pairs in probes.pairs.values()
    ]
    first, second = again.pairs["ocr"][0], probes.pairs["ocr"][0]
    assert first.image_a.tobytes() == second.image_a.tobytes()
