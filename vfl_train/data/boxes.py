"""Boxes in texts, and whether they lie in their image: a hint for people, never a reason to refuse a row.

Two notations are read: `(x1,y1),(x2,y2)` (Qwen's, with or without its box tokens) and `[x1, y1, x2, y2]`.
Three kinds of coordinates are in use: pixels, relative to 1000, and shares of 1. Nobody writes down which, so
it is told from all boxes of a set together, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_N = r"\s{0,4}(-?\d{1,7}(?:\.\d{1,9})?)\s{0,4}"
_PAIRS = re.compile(rf"\({_N},{_N}\)\s{{0,4}},?\s{{0,4}}\({_N},{_N}\)")
_LIST = re.compile(rf"\[{_N},{_N},{_N},{_N}\]")
KINDS = ("shares of 1", "pixels", "relative-1000")  # narrowest first, for images of usual sizes
SHARE_NEEDED = 0.9  # of all boxes, for a kind of coordinates to be taken as the one in use
MAX_LISTED = 1000  # rows kept by number
EXAMPLES = 3

Box = tuple[float, float, float, float]


def boxes_in(text: str) -> Iterator[Box]:
    """The boxes that a text names, as x1, y1, x2, y2, in order of their notation."""
    for pattern in (_PAIRS, _LIST):
        for found in pattern.finditer(text):
            x1, y1, x2, y2 = map(float, found.groups())
            yield x1, y1, x2, y2


@dataclass
class _Misfits:
    rows: int = 0
    listed: list[int] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


class BoxCensus:
    """Counts the boxes of a data set and the rows with boxes outside their images."""

    def __init__(self) -> None:
        self.boxes = 0
        self.fitting = dict.fromkeys(KINDS, 0)
        self._misfits = {kind: _Misfits() for kind in (*KINDS, "any")}

    def add(self, row: int, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> None:
        """Take note of the boxes of one row, whose images have these sizes (width, height)."""
        wrong: dict[str, Box] = {}
        for box in boxes:
            fits = _fits(box, sizes)
            self.boxes += 1
            for kind in KINDS:
                self.fitting[kind] += fits[kind]
                if not fits[kind]:
                    wrong.setdefault(kind, box)
            if not any(fits.values()):
                wrong.setdefault("any", box)
        for kind, box in wrong.items():
            misfits = self._misfits[kind]
            misfits.rows += 1
            if len(misfits.listed) < MAX_LISTED:
                misfits.listed.append(row)
            if len(misfits.examples) < EXAMPLES:
                shown = ", ".join(f"{value:g}" for value in box)
                where = ", ".join(f"{width} x {height}" for width, height in sizes)
                misfits.examples.append(f"row {row}: [{shown}] in {where}")

    @property
    def kind(self) -> str:
        """The kind of coordinates in use, "" where it cannot be told.

        Shares of 1 fit pixels and relative-1000 too, and pixels of small images fit relative-1000, so the
        narrowest kind that holds for nearly all boxes is taken.
        """
        for kind in KINDS:
            if self.boxes and self.fitting[kind] >= SHARE_NEEDED * self.boxes:
                return kind
        return ""

    @property
    def outside(self) -> tuple[int, list[int], list[str]]:
        """Rows with a box outside: how many, the numbers of the first, and examples. Where the kind cannot be
        told, those that fit none."""
        found = self._misfits[self.kind or "any"]
        return found.rows, found.listed, found.examples


def _fits(box: Box, sizes: Sequence[tuple[int, int]]) -> dict[str, bool]:
    x1, y1, x2, y2 = box
    right, bottom, low = max(x1, x2), max(y1, y2), min(box)
    return {
        "pixels": low >= 0 and any(right <= width and bottom <= height for width, height in sizes),
        "relative-1000": low >= 0 and max(right, bottom) <= 1000,
        "shares of 1": low >= 0 and max(right, bottom) <= 1,
    }
