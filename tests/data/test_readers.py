"""Containers, formats, byte equality, and the count that must come out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfl_train.data import records
from vfl_train.data.readers import read_dataset, write_quarantine, write_selected
from vfl_train.data.rows import Reason
from vfl_train.errors import ConfigError, DataError, DiskError

MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
ODD_LINES = [
    b'  {"id":"a" ,\t"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"\\u0041 \\/"}]}  ',
    b'{"conversations":[{"value":"q","from":"human"},'
    b'{"from":"gpt","value":"\xc3\xa9 \xf0\x9f\x98\x80"}],"x":1.50}\r',
    b'{"conversations":[{"from":"human","value":"\xe2\x80\xa8q"},{"from":"gpt","value":"a\\u2028"}],"x":-0}',
]


def test_jsonl_lines_come_back_byte_for_byte(write_jsonl, tmp_path):
    path = write_jsonl(ODD_LINES)
    dataset = read_dataset(path)
    assert [row.raw for row in dataset.rows] == ODD_LINES
    write_selected(dataset, dataset.rows, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == path.read_bytes()
    write_selected(dataset, [dataset.rows[2], dataset.rows[0]], tmp_path / "some.jsonl")
    assert (tmp_path / "some.jsonl").read_bytes() == ODD_LINES[0] + b"\n" + ODD_LINES[2] + b"\n"


def test_last_line_without_newline_and_byte_order_mark(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(records.BOM + ODD_LINES[0] + b"\n" + ODD_LINES[2] + b"\n \n\n")
    dataset = read_dataset(path)
    assert [row.raw for row in dataset.rows] == [ODD_LINES[0], ODD_LINES[2]] and dataset.n_read == 2
    path.write_bytes(ODD_LINES[0])
    dataset = read_dataset(path)
    write_selected(dataset, dataset.rows, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == ODD_LINES[0] + b"\n"


@pytest.mark.parametrize("window", [1, 3, 64, 1 << 20])
def test_array_elements_come_back_byte_for_byte(tmp_path, monkeypatch, window):
    monkeypatch.setattr(records, "WINDOW", window)
    elements = [line.strip() for line in ODD_LINES]
    path = tmp_path / "d.json"
    path.write_bytes(records.BOM + b" [\n" + b" ,\n\t".join(elements) + b"\n ] \n")
    dataset = read_dataset(path)
    assert [row.raw for row in dataset.rows] == elements
    assert [row.line for row in dataset.rows] == [2, 3, 4]
    write_selected(dataset, reversed(dataset.rows), tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == b"[\n" + b",\n".join(elements) + b"\n]\n"
    again = read_dataset(tmp_path / "out.json")
    assert [row.raw for row in again.rows] == elements
    write_selected(dataset, [], tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_bytes()) == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(JSON_VALUES, max_size=6),
    escape=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    window=st.integers(1, 40),
)
def test_array_scanner_agrees_with_json(tmp_path_factory, values, escape, indent, window):
    """Any array, any window: the same values as json.loads, and spans that decode to them."""
    text = json.dumps(values, ensure_ascii=escape, indent=indent).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.mktemp("scan") / "d.json"
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "WINDOW", window)
        found = list(records.read_array(path))
    assert len(found) == len(values)
    for record, value in zip(found, values, strict=True):
        if record.problem is None:
            assert record.value == value
            assert json.loads(record.raw) == value
        assert text.count(record.raw) >= 1


def test_array_with_bad_rows_is_read_on(tmp_path, make_row):
    good = json.dumps(make_row(0, image=None)).encode()
    odd = [
        b"NaN",
        b"7",
        b'"text"',
        good.replace(b"three", b"th\xffee"),
        b'{"id": ' + b"9" * 5000 + b"}",
        b"null",
    ]
    path = tmp_path / "d.json"
    path.write_bytes(b"[" + b",".join([*odd, good]) + b"]")
    dataset = read_dataset(path)
    assert [row.raw for row in dataset.rows] == [good]
    bad_json, no_object = Reason.bad_json, Reason.not_an_object
    codes = [bad_json, no_object, no_object, Reason.bad_utf8, bad_json, no_object]
    assert [entry.code for entry in dataset.rejected] == codes


@pytest.mark.parametrize("window", [2, 1 << 20])
@pytest.mark.parametrize(
    ("tail", "where"),
    [
        (b',\n{"id": }]', "element 2, line 3"),
        (b',\n{"id": "open', "element 2, line 3"),
        (b'\n{"id": 1}]', "element 2, line 3"),
        (b",]", "element 2, line 2"),
        (b"", "element 2, line 2"),
        (b"] x", "element 2, line 2"),
        (b",\n" + b"[" * 200_000 + b"]" * 200_001, "element 2, line 3"),
    ],
)
def test_broken_array_names_the_place(tmp_path, make_row, monkeypatch, window, tail, where):
    monkeypatch.setattr(records, "WINDOW", window)
    row = json.dumps(make_row(0, image=None)).encode()
    path = tmp_path / "d.json"
    path.write_bytes(b"[" + row + b",\n" + row + tail)
    monkeypatch.setattr("vfl_train.data.containers.detect_container", lambda file: "json")
    with pytest.raises(DataError, match=where) as caught:
        read_dataset(path)
    assert str(path) in caught.value.message and "byte" in caught.value.message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a":1}\n{"a":2}\n', "jsonl"),
        (b'[{"a":1},{"a":2}]', "json"),
        (b'\n\n [\n{"a":1},\n{"a":2}\n]\n', "json"),
        (b'[\n  {\n    "a": 1\n  }\n]', "json"),
        (b'[1]\n{"a":1}\n', "jsonl"),
        (b'[{"a":1}\n{"a":1}\n{"a":2}\n', "jsonl"),
        (b'[{"a":1},\n{"a":', "json"),
        (b"[]", "json"),
        (b"garbage", "jsonl"),
    ],
)
def test_container_is_told_from_content(tmp_path, content, expected):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    assert records.detect_container(path) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("llava", "llava-jsonl"),
        ("text only", "llava-jsonl"),
        ("sharegpt", "sharegpt-jsonl"),
        ("messages", "messages-jsonl"),
    ],
)
def test_format_is_detected_and_logged(write_jsonl, image_root, make_row, caplog, rows, expected):
    kinds = {
        "llava": [make_row(0, None), make_row(1)],
        "text only": [make_row(0, None)],
        "sharegpt": [{"images": ["b.png"], **make_row(1, None)}],
        "messages": [MESSAGES],
    }
    kinds["sharegpt"][0]["conversations"][0]["value"] = "<image>q"
    with caplog.at_level(logging.INFO):
        dataset = read_dataset(write_jsonl(kinds[rows]), image_root)
    assert dataset.format == expected and not dataset.rejected
    assert expected in caplog.text


def test_mixed_formats_are_refused(write_jsonl, make_row):
    path = write_jsonl([make_row(0, None), b"broken", MESSAGES])
    with pytest.raises(DataError, match=r"data\.jsonl mixes formats: line 3"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "no rows"),
        (b"garbage\nmore\n", "none of 2 rows is of a known format; line 1"),
        (b'{"data": [\n{"conversations": []}]}', "none of 2 rows is of a known format; line 1"),
        (b"\xff\xfe[\x00]\x00", "UTF-16"),
    ],
)
def test_files_without_rows(tmp_path, content, message):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["none.jsonl", "none", "/none/at/all", "device", "none-*.tar", "a/b/c"])
def test_paths_with_nothing_to_read_are_config_errors(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(ConfigError, match=r"there is no file|neither a file nor") as caught:
        read_dataset(name)
    assert "\n" not in str(caught.value) and "--data" in caught.value.fix


def test_image_root_must_be_a_folder(write_jsonl, make_row, tmp_path):
    with pytest.raises(ConfigError, match="image root"):
        read_dataset(write_jsonl([make_row(0)]), tmp_path / "none")


def test_blank_lines_inside_are_rows_and_limit_counts_rows_read(write_jsonl, make_row):
    path = write_jsonl([make_row(0, None), b"", b"  ", make_row(3, None), b"", b""])
    dataset = read_dataset(path)
    assert (dataset.n_read, [r.row for r in dataset.rows], len(dataset.rejected)) == (4, [0, 3], 2)
    assert read_dataset(path, limit=2).n_read == 2
    assert read_dataset(path, limit=2).sha256 == dataset.sha256


def test_uids_differ_for_repeated_rows_and_ids(write_jsonl, make_row):
    dataset = read_dataset(write_jsonl([make_row(0, None)] * 3))
    assert len({row.uid for row in dataset.rows}) == 3
    assert {row.source for row in dataset.rows} == {"data"}


def test_lost_or_doubled_rows_cannot_make_a_dataset(write_jsonl, make_row):
    dataset = read_dataset(write_jsonl([make_row(0, None), b"broken"]))
    for wrong in ({"rows": []}, {"rows": [*dataset.rows] * 2}, {"n_read": 3}):
        with pytest.raises(RuntimeError, match="lost or counted twice"):
            replace(dataset, **wrong)


def test_bad_image_is_quarantined_once_per_row_and_only_when_checked(write_jsonl, make_row, image_root):
    (image_root / "bad.png").write_bytes((image_root / "a.png").read_bytes()[:48])
    path = write_jsonl([make_row(0), make_row(1, "bad.png"), make_row(2, "./bad.png"), make_row(3)])
    dataset = read_dataset(path, image_root)
    assert [row.row for row in dataset.rows] == [0, 3]
    assert dataset.counts() == {"image_truncated": 2}
    assert len(read_dataset(path, image_root, check_images=False).rows) == 4


def test_quarantine_file(write_jsonl, make_row, tmp_path):
    dataset = read_dataset(write_jsonl([b"{", make_row(1, None), make_row(2, "no.png")]))
    write_quarantine(reversed(dataset.rejected), tmp_path / "quarantine.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["row", "line", "id", "code", "detail"]] * 2
    assert [(x["row"], x["line"], x["id"], x["code"]) for x in lines] == [
        (0, 1, "#0", "bad_json"),
        (2, 3, "r2", "image_missing"),
    ]


def test_failed_write_leaves_nothing(write_jsonl, make_row, tmp_path):
    dataset = read_dataset(write_jsonl([make_row(0, None)]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DiskError):
        write_selected(dataset, dataset.rows, tmp_path / "no folder" / "out.jsonl")
    (tmp_path / "taken").mkdir()
    with pytest.raises(DiskError):
        write_selected(dataset, dataset.rows, tmp_path / "taken")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "taken"])
