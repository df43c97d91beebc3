"""How answers are judged."""

from __future__ import annotations

import pytest

from vfl_train.functions.matching import box, iou, matches


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("Cat", "cat", True),
        (" cat.\n", "cat", True),
        ("a  cat", "a cat", True),
        ("cats", "cat", False),
        ("4 A 7", "4 A 7", True),
        ("4 A 1", "4 A 7", False),
        ("", "cat", False),
    ],
)
def test_exact(output, expected, right):
    assert matches(output, expected) is right


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("B", "b", True),
        ("(B)", "B", True),
        ("B. the car", "B", True),
        ("Bus", "B", False),
        ("A", "A", True),
        ("A.", "A", True),
        ("(A)", "A", True),
        ("A) the car", "A", True),
        ("A: the car", "A", True),
        ("A dog.", "A", False),
        ("A-frame", "A", False),
        ("A-frame", "A. the red car", False),
        ("3 dogs", "3", True),
        ("No-one", "no", False),
        ("No, no-one", "no", True),
        ("No - none", "no", True),
        ("A", "B", False),
        ("a", "A. the red car", True),
        ("(A)", "A. the red car", True),
        ("**A**: the red car", "A. the red car", True),
        ("A the red car", "A. the red car", True),
        ("The red car.", "A. the red car", True),
        ("The red cart", "A. the red car", False),
        ("A red car", "A. the red car", False),  # an article, not the letter
        ("A blue bus", "A. the red car", False),
        ("B. the red car", "A. the red car", False),
        ("", "A. the red car", False),
    ],
)
def test_choice(output, expected, right):
    assert matches(output, expected, "choice") is right


def test_boxes():
    assert box("[10, 20, 30.5, 40]") == (10, 20, 30.5, 40)
    assert box("10, 20, 30") is None
    assert box("30 0 10 5") is None
    assert box('[{"bbox_2d": [105, 301, 232, 480], "label": "cat"}]') == (105, 301, 232, 480)
    assert box("cat[[253, 231, 733, 787]]") == (253, 231, 733, 787)
    assert box("(123,456),(789,1011)") == (123, 456, 789, 1011)
    assert box("x1=10, y1=20, x2=30, y2=40") == (10, 20, 30, 40)
    assert box("-5 -4 3 2") == (-5, -4, 3, 2)
    assert box("10-20-30-40") == (10, 20, 30, 40)
    assert box("<loc0123><loc0200><loc0500><loc0600>") is None
    tiny = "0." + "0" * 200
    assert not matches(f"0 0 {tiny}1 {tiny}1", f"0 0 {tiny}1 {tiny}1", "iou")
    assert not matches(f"0 0 {'9' * 400} {'9' * 400}", f"0 0 {'9' * 400} 1", "iou")
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert matches("(0, 0, 10, 10)", "0,0,10,9", "iou")
    assert not matches("(0, 0, 10, 10)", "5,5,20,20", "iou")
    assert not matches("no idea", "0,0,10,9", "iou")


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("3", "3", True),
        ("There are three.", "3", True),
        ("3 cats", "three", True),
        ("3.0", "3", True),
        ("1,200 people", "1200", True),
        ("between 3 and 4", "3", False),
        ("3 of them, three", "3", True),
        ("several", "3", False),
        ("several", "many", False),
        ("13", "3", False),
        ("-3", "3", False),
        ("none", "0", False),
        ("someone saw 2", "2", True),
    ],
)
def test_number(output, expected, right):
    assert matches(output, expected, "number") is right
