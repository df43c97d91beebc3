"""Boxes in texts: what is read as one, which coordinates they are in, and what lies outside."""

from __future__ import annotations

import random
import time

import pytest
from PIL import Image

from vfl_train.data.boxes import BoxCensus, boxes_in
from vfl_train.data.pool import open_pool
from vfl_train.data.survey import Survey


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<|box_start|>(221,423),(569,886)<|box_end|>", [(221, 423, 569, 886)]),
        ("<box>(1, 2),(3, 4)</box> and (5,6) , (7,8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('{"bbox_2d": [10, 20, 30.5, 40], "label": "a"}', [(10, 20, 30.5, 40)]),
        ("at [0.1, 0.25,0.5, 1.0] and [ 1,2,3,4 ]", [(0.1, 0.25, 0.5, 1.0), (1, 2, 3, 4)]),
        ("[-5, 0, 10, 10]", [(-5, 0, 10, 10)]),
        ("[1, 2, 3] (1, 2) f(1,2) [1, 2, 3, 4, 5] [a, b, c, d] 1, 2, 3, 4", []),
        ("[99999999, 0, 1, 1]", []),  # no number of pixels
    ],
)
def test_notations(text, boxes):
    assert list(boxes_in(text)) == boxes


def test_hostile_text_is_read_in_linear_time():
    started = time.process_time()
    for text in ("[" * 500_000, "[ " * 300_000, "(1," * 300_000, "[1,1,1," * 150_000, " " * 900_000):
        assert list(boxes_in(text)) == []
    assert time.process_time() - started < 5


def census(boxes, size=(640, 480)) -> BoxCensus:
    found = BoxCensus()
    for row, box in enumerate(boxes):
        found.add(row, [box], [size])
    return found


def drawn(count: int, width: float, height: float) -> list[tuple[float, float, float, float]]:
    rng = random.Random(0)
    return [(*sorted_box(rng, width, height),) for _ in range(count)]


def sorted_box(rng, width, height):
    x1, x2 = sorted(rng.uniform(0, width) for _ in range(2))
    y1, y2 = sorted(rng.uniform(0, height) for _ in range(2))
    return x1, y1, x2, y2


def test_coordinates_are_told_from_all_boxes_together():
    assert census(drawn(200, 640, 480)).kind == "pixels"
    assert census(drawn(200, 1000, 1000)).kind == "relative-1000"
    assert census(drawn(200, 1, 1)).kind == "shares of 1"
    assert census(drawn(200, 4000, 3000), (4000, 3000)).kind == "pixels"
    assert census(drawn(100, 1000, 1000) + drawn(100, 5000, 5000)).kind == ""
    assert census([]).kind == "" and census([]).outside == (0, [], [])


@pytest.mark.parametrize(
    ("usual", "wrong", "fine"),
    [
        (drawn(200, 640, 480), (600, 10, 700, 20), (600, 10, 640, 480)),
        (drawn(200, 1000, 1000), (600, 10, 1001, 20), (900, 900, 1000, 1000)),
        (drawn(200, 1, 1), (0.5, 0.5, 1.2, 0.6), (0, 0, 1, 1)),
        (drawn(200, 640, 480), (-1, 10, 20, 20), (0, 0, 1, 1)),
    ],
)
def test_outside_is_outside_of_the_coordinates_in_use(usual, wrong, fine):
    count, rows, examples = census([*usual, fine, wrong]).outside
    assert (count, rows) == (1, [len(usual) + 1])
    assert examples[0].startswith(f"row {len(usual) + 1}: [") and "640 x 480" in examples[0]


def test_where_it_cannot_be_told_only_what_fits_nothing_is_outside():
    boxes = drawn(50, 1000, 1000) + drawn(50, 1, 1) + [(1500, 0, 1600, 1)] * 20
    found = census(boxes)
    assert found.kind == "" and found.outside[0] == 20


def test_survey_warns_and_keeps_the_row(write_jsonl, make_row, image_root):
    """Several images: a box may be of any; turned ones count as they are seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(image_root / "turned.jpg", exif=exif)  # seen as 20 x 40
    rows = [make_row(i, "a.png", f"at [1, 2, {i % 16}, 16]") for i in range(30)]
    rows += [make_row(30, "turned.jpg", "[0, 0, 20, 40]"), make_row(31, "turned.jpg", "[0, 0, 40, 20]")]
    two = make_row(32, None, "[0, 0, 20, 40]")
    two["conversations"][0]["value"] = "<image><image>where?"
    rows.append({**two, "image": ["a.png", "turned.jpg"]})
    rows.append(make_row(33, None, "no image, so nothing is outside: [0, 0, 9000, 9000]"))
    pool = open_pool(write_jsonl(rows), image_root)
    survey = Survey(pool).run(pool.iterate(check_images=True))
    assert survey.n_kept == len(rows)
    assert survey.findings()["box_outside"].rows == [31]
    assert survey.as_dict()["boxes"] == {"count": 33, "coordinates": "pixels"}
