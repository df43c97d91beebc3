"""Rows above --max-length: dropped, shrunk or refused; processors with and without a pixel limit."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_vlm

from vfl_train.data.collator import Collator, Encoder
from vfl_train.data.overlong import FittingCollator, fitted, judge_rows, pixel_limits
from vfl_train.data.rows import ImageRef, Reason, Row, assistant_message, user_message
from vfl_train.errors import ConfigError, DataError

SIZES = ((64, 64), (32, 32), (128, 40), (64, 48), None)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of 61, 49, 61 and 57 tokens for the tiny Qwen2.5-VL, and one without an image."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    made = []
    for index, size in enumerate(SIZES):
        refs = ()
        if size is not None:
            pixels = rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            refs = (ImageRef(folder / f"{index}.png", None, f"{index}.png"),)
        messages = (user_message("what?", len(refs)), assistant_message("three cats"))
        made.append(Row(index, f"u{index}", "rows", messages, refs, b"", f"id{index}", index + 1))
    return made


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return tiny_vlm("qwen2_5_vl").encoder


def lengths(rows: list[Row], collator: Collator) -> dict[int, int]:
    return {row.row: collator.encode(row).length for row in rows}


def test_dropped_rows_are_quarantined_by_their_exact_length(rows: list[Row], encoder: Encoder) -> None:
    exact = lengths(rows, Collator(encoder))
    limit = exact[3]
    found = fitted(rows, judge_rows(rows, encoder, limit, "drop"), limit)
    assert [row.row for row in found.rows] == [r for r in exact if exact[r] <= limit] != list(exact)
    assert {r.row: str(r.code) for r in found.rejected} == {r: "too_long" for r in exact if exact[r] > limit}
    assert f"{exact[0]} tokens, --max-length is {limit}" in found.rejected[0].detail
    assert found.rejected[0].line == 1 and not found.limits


def test_every_row_is_encoded_once(rows: list[Row], encoder: Encoder, monkeypatch) -> None:
    seen, lock, encode = [], threading.Lock(), Encoder.encode

    def counted(self, messages, images, *args, **kwargs):
        with lock:
            seen.append(len(images))
        return encode(self, messages, images, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode", counted)
    judge_rows(rows, encoder, 50, "drop")
    assert len(seen) == len(rows)


@pytest.mark.parametrize("limit", [60, 56, 52, 49])
def test_shrunk_rows_fit_and_lose_no_token_of_their_text(
    rows: list[Row], encoder: Encoder, limit: int
) -> None:
    exact = lengths(rows, Collator(encoder))
    found = fitted(rows, judge_rows(rows, encoder, limit, "shrink-image"), limit)
    assert not found.rejected and set(found.limits) == {r for r in exact if exact[r] > limit}
    collator = FittingCollator(encoder, found.limits)
    for row in rows:
        plain, shrunk = Collator(encoder).encode(row), collator.encode(row)
        assert shrunk.length <= limit
        if row.row not in found.limits:
            assert shrunk.length == plain.length
        texts = [[t for t in e.inputs["input_ids"][0].tolist() if t not in encoder.placeholder_ids]
                 for e in (plain, shrunk)]  # fmt: skip
        assert texts[0] == texts[1]
        assert shrunk.n_answer_tokens == plain.n_answer_tokens
        if row.images:  # as many image tokens as pixels: nothing was cut
            grid = shrunk.inputs["image_grid_thw"][0].prod().item() // 4
            ids = shrunk.inputs["input_ids"][0]
            assert sum(int((ids == i).sum()) for i in encoder.placeholder_ids) == grid


def test_shrinking_keeps_as_much_as_fits(rows: list[Row], encoder: Encoder) -> None:
    """One more token allowed may only keep more of an image."""
    kept = []
    for limit in (49, 53, 57):
        found = fitted(rows, judge_rows(rows, encoder, limit, "shrink-image"), limit)
        kept.append(FittingCollator(encoder, found.limits).encode(rows[0]).length)
    assert kept == sorted(kept) and kept[-1] > kept[0] and kept[-1] >= 54


def test_a_row_whose_text_alone_is_too_long_cannot_be_shrunk(rows: list[Row], encoder: Encoder) -> None:
    long = Row(9, "u9", "rows", (user_message("what? " * 50), assistant_message("x")), rows[0].images, b"")
    found = fitted([*rows, long], judge_rows([*rows, long], encoder, 56, "shrink-image"), 56)
    assert [(r.row, r.code) for r in found.rejected] == [(9, Reason.too_long)]
    assert "cannot be shrunk" in found.rejected[0].detail


def test_error_names_the_first_row_and_its_length(rows: list[Row], encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"row 0 \(line 1\) of rows, id id0, has 61 tokens") as caught:
        judge_rows(rows, encoder, 60, "error")
    assert caught.value.exit_code == 3
    assert judge_rows(rows, encoder, 61, "error") == [None] * len(rows)


def test_a_processor_without_a_pixel_limit_cannot_shrink(rows: list[Row]) -> None:
    fixed = tiny_vlm("llava").encoder
    assert pixel_limits(fixed.processor) is None
    with pytest.raises(ConfigError, match=r"CLIPImageProcessor.* has no pixel limit"):
        judge_rows(rows, fixed, 20, "shrink-image")


def test_no_row_left_is_a_data_error_with_an_example(rows: list[Row], encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"none of 5 rows .* row 0: 61 tokens"):
        fitted(rows, judge_rows(rows, encoder, 5, "drop"), 5)


def test_an_image_gone_in_the_meantime_is_quarantined_with_its_own_reason(
    rows: list[Row], encoder: Encoder, tmp_path: Path
) -> None:
    gone = Row(7, "u7", "rows", rows[0].messages, (ImageRef(tmp_path / "no.png", None, "no.png"),), b"")
    found = fitted([rows[1], gone], judge_rows([rows[1], gone], encoder, 90, "drop"), 90)
    assert [r.row for r in found.rejected] == [7] and found.rejected[0].code is not Reason.too_long


def test_the_bar_is_silent_without_a_terminal(rows: list[Row], encoder: Encoder, capsys) -> None:
    assert not sys.stderr.isatty()
    judge_rows(rows, encoder, 90, "drop")
    assert capsys.readouterr().err == ""
