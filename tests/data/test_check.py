"""`vfl-train data check` and `data preview`."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from PIL import Image
from pools import WRITERS, pool_rows

from vfl_train.config import DataConfig
from vfl_train.data import check as data_check
from vfl_train.data.pool import open_pool
from vfl_train.data.rows import assistant_message, user_message
from vfl_train.data.survey import Survey
from vfl_train.errors import ConfigError, DataError


def config(path, root=None, action="check", **options) -> DataConfig:
    return DataConfig(action=action, data=str(path), image_root=root, **options)


@pytest.fixture
def qwen(encoders, monkeypatch):
    """`load_processor` gives a Qwen processor, whatever is asked for."""
    models = ModuleType("vfl_train.models")
    models.load_processor = lambda name, revision=None, max_pixels=None: encoders["qwen"].processor
    monkeypatch.setitem(sys.modules, "vfl_train.models", models)


def test_check_prints_counts_and_statistics(write_jsonl, make_row, image_root, capsys):
    path = write_jsonl(
        [make_row(0), make_row(0, None, "a b"), b"{", make_row(3, "no.png"), make_row(4, "no.png")]
    )
    data_check.check(config(path, image_root))
    printed = capsys.readouterr().out
    assert "llava-jsonl" in printed and "5 read = 2 kept + 3 quarantined" in printed
    assert "image_missing" in printed and "line 4, id r3: no.png is not there" in printed
    assert "images per row: 0 in 1 rows, 1 in 1 rows" in printed
    assert "answers: 2 (1.00 a row, 2 different), characters median 3, longest 5" in printed
    assert "row 1: id r0 as row 0" in printed


def test_check_without_a_usable_row_is_a_data_error(write_jsonl, make_row, image_root, capsys):
    with pytest.raises(DataError, match="none of 1 rows is usable; row 0") as caught:
        data_check.check(config(write_jsonl([make_row(0, "no.png")]), image_root))
    assert caught.value.exit_code == 3
    assert "image_missing" in capsys.readouterr().out


def test_strict_fails_on_the_first_bad_row(write_jsonl, make_row, image_root):
    path = write_jsonl([make_row(0), make_row(1, "no.png"), make_row(2)])
    assert data_check.check(config(path, image_root)).n_kept == 2
    with pytest.raises(DataError, match=r"1 of 3 rows are not usable; row 1: no\.png") as caught:
        data_check.check(config(path, image_root, strict=True))
    assert caught.value.exit_code == 3
    data_check.check(config(write_jsonl([make_row(0)]), image_root, strict=True))


def test_repeats_are_counted_by_content(write_jsonl, make_row, image_root):
    (image_root / "copy.png").write_bytes((image_root / "a.png").read_bytes())
    rows = [make_row(0), make_row(1), make_row(1, "b.png"), {**make_row(0, "copy.png"), "id": "new"}]
    rows += [make_row(0, None), {**make_row(9, None), "id": None}, {**make_row(9, None), "id": None}]
    pool = open_pool(write_jsonl(rows), image_root)
    found = Survey(pool).run(pool.iterate()).findings()
    assert {name: flag.rows for name, flag in found.items()} == {
        "duplicate_id": [2, 4],
        "duplicate_row": [3, 6],  # another id and another name of the image, or no id
        "duplicate_image": [3],
    }
    assert found["duplicate_row"].examples[0] == "row 3: repeats row 0"


@pytest.mark.parametrize("kind", WRITERS)
def test_every_container_is_checked_alike(tmp_path, kind, capsys):
    rows = pool_rows(9)
    rows[4]["images"][0]["bytes"] = b"<html>"
    path = WRITERS[kind](tmp_path, [*rows, {**rows[8], "id": "r9"}])
    survey = data_check.check(config(path, output=tmp_path / "out"))
    assert survey.totals() == "10 read = 9 kept + 1 quarantined"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows_read"] == report["rows_kept"] + report["rows_quarantined"] == 10
    assert report["quarantine"] == {"image_format": 1}
    assert report["flags"]["duplicate_row"]["first_rows"] == [9]
    assert report["data"]["format"] == f"messages-{kind}"
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 4 and json.loads(line)["id"] == "r4"
    assert "image_format" in capsys.readouterr().out


def test_output_folder_is_not_written_over(tmp_path, write_jsonl, make_row):
    first = write_jsonl([make_row(0, None)])
    data_check.check(config(first, output=tmp_path / "out"))
    second = write_jsonl([make_row(1, None)], "other.jsonl")
    with pytest.raises(ConfigError):
        data_check.check(config(second, output=tmp_path / "out"))
    data_check.check(config(second, output=tmp_path / "out", overwrite=True))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["data"]["name"] == "other.jsonl"


def test_max_length_sends_every_row_through_the_processor(qwen, write_jsonl, make_row, image_root, capsys):
    Image.new("RGB", (280, 280), "red").save(image_root / "large.png")
    path = write_jsonl(
        [make_row(0), make_row(1, answer="see <|image_pad|>"), make_row(2, "large.png"), make_row(3, None)]
    )
    survey = data_check.check(config(path, image_root, max_length=60))
    assert survey.counts() == {"placeholder_in_text": 1}
    assert survey.findings()["over_long"].rows == [2]
    assert survey.token_lengths.total() == 3
    printed = capsys.readouterr().out
    assert "rows longer than --max-length" in printed and "tokens: median" in printed
    assert not data_check.check(config(path, image_root)).token_lengths


def test_a_row_is_never_counted_twice_or_skipped(write_jsonl, make_row):
    pool = open_pool(write_jsonl([make_row(0, None), make_row(1, None)]))
    entries = list(pool.iterate())
    for wrong in ([entries[1]], [entries[0], entries[0]]):
        with pytest.raises(RuntimeError, match="is due"):
            Survey(pool).run(wrong)


def test_preview_marks_supervised_tokens(qwen, write_jsonl, make_row, image_root, capsys):
    path = write_jsonl(
        [make_row(0), make_row(1, "no.png"), make_row(2, answer="see <|image_pad|>"), make_row(3)]
    )
    data_check.preview(config(path, image_root, "preview", limit=2))
    printed = capsys.readouterr().out
    assert "\u27e6three<|im_end|>\u27e7" in printed
    assert "<image x " in printed and "how many 0?" in printed and "how many 3?" not in printed
    assert "[placeholder_in_text]" in printed and "image_missing" in printed


@pytest.mark.parametrize("kind", WRITERS)
def test_preview_of_several_turns_and_images(qwen, tmp_path, kind, capsys):
    path = WRITERS[kind](tmp_path, pool_rows(3))
    data_check.preview(config(path, action="preview", limit=3))
    printed = capsys.readouterr().out
    assert printed.count("\u27e6") == 1 + 6 and printed.count("\u27e6yes<|im_end|>\u27e7") == 3
    assert printed.count("<image x ") == 3 and "2 images, 2 answers" in printed
    assert printed.count("16 x 12 pixels") == 3


def test_preview_without_a_usable_row(write_jsonl, make_row):
    with pytest.raises(DataError, match="none of 2 rows is usable"):
        data_check.preview(config(write_jsonl([make_row(0, "x.png")] * 2), action="preview"))


def test_marked_tokens_show_everything(encoders, picture):
    encoder = encoders["phantom"]
    encoded = encoder.encode([user_message("what text ?"), assistant_message("three")], [picture])
    text = data_check.marked_tokens(encoder, encoded).plain
    assert "<image x 64>" in text and "\u27e6three <|im_end|>\u27e7" in text
    assert "2 of 76 tokens supervised" in text
