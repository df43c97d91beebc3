"""`vfl-train data check` and `data preview`."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from vfl_train.data import check as data_check
from vfl_train.data.rows import assistant_message, user_message
from vfl_train.errors import DataError


def config(path, root=None, **options):
    return SimpleNamespace(
        **{"data": str(path), "image_root": root, "limit": None, "model": "phantom", **options}
    )


def test_check_prints_counts_and_statistics(write_jsonl, make_row, image_root, capsys):
    path = write_jsonl(
        [make_row(0), make_row(0, None, "a b"), b"{", make_row(3, "no.png"), make_row(4, "no.png")]
    )
    data_check.check(config(path, image_root))
    printed = capsys.readouterr().out
    assert "llava-jsonl" in printed and "5 read = 2 kept + 3 quarantined" in printed
    assert "image_missing" in printed and "line 4, id r3: no.png is not there" in printed
    assert "images per row: 0 in 1 rows, 1 in 1 rows" in printed
    assert "answers: 2 (1.00 a row, 2 different), characters median 4, longest 5" in printed
    assert "rows that share their id: 2" in printed


def test_check_without_a_usable_row_is_a_data_error(write_jsonl, make_row, image_root, capsys):
    with pytest.raises(DataError, match="none of 1 rows is usable; row 0") as caught:
        data_check.check(config(write_jsonl([make_row(0, "no.png")]), image_root))
    assert caught.value.exit_code == 3
    assert "image_missing" in capsys.readouterr().out


def test_preview_marks_supervised_tokens(write_jsonl, make_row, image_root, encoders, capsys, monkeypatch):
    models = ModuleType("vfl_train.models")
    models.load_processor = lambda name, revision=None, max_pixels=None: encoders["qwen"].processor
    monkeypatch.setitem(sys.modules, "vfl_train.models", models)
    path = write_jsonl(
        [make_row(0), make_row(1, "no.png"), make_row(2, answer="see <|image_pad|>"), make_row(3)]
    )
    data_check.preview(config(path, image_root, limit=2))
    printed = capsys.readouterr().out
    assert "\u27e6three<|im_end|>\u27e7" in printed
    assert "<image x " in printed and "how many 0?" in printed and "how many 3?" not in printed
    assert "[placeholder_in_text]" in printed


def test_marked_tokens_show_everything(encoders, picture):
    encoder = encoders["phantom"]
    encoded = encoder.encode([user_message("what text ?"), assistant_message("three")], [picture])
    text = data_check.marked_tokens(encoder, encoded).plain
    assert "<image x 64>" in text and "\u27e6three <|im_end|>\u27e7" in text
    assert "2 of 76 tokens supervised" in text
