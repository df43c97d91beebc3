"""Whether an output counts as the expected answer, in the ways a probe pair or a data file may ask for."""

from __future__ import annotations

import re
import string

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")  # not the 2 of "bbox_2d"
_OPTION = re.compile(r"([a-z])[.:)] ?(\S.*)")  # "b. the car", as `normalise` leaves it
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_EDGES = string.punctuation + string.whitespace


def normalise(text: str) -> str:
    """Case folded, white space collapsed, punctuation at both ends removed."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def matches(output: str, expected: str, match: str = "exact") -> bool:
    """Whether `output` gives `expected`.

    `exact`: equal after `normalise`. `choice`: the output starts with the option (a letter or word, as in
    "B", "(B)", "B. the car"); an expected "B. the car" is given by its letter or by its words. A letter must
    stand alone: "A red car" does not choose A. `iou`: both hold four numbers and the boxes overlap by more
    than one half. `number`: both name one number, the same ("There are three." for "3"); an output that names
    two different ones names none.
    """
    if match == "number":
        said, asked = number(output), number(expected)
        return said is not None and said == asked
    if match == "iou":
        a, b = box(output), box(expected)
        return a is not None and b is not None and iou(a, b) > 0.5
    given, wanted = normalise(output), normalise(expected)
    if match == "choice":
        option = _OPTION.fullmatch(wanted)
        if option is None:
            alone = len(wanted) == 1 and wanted.isalpha()
            return _stands_alone(given, wanted) if alone else _starts(given, wanted)
        letter, words = option.groups()
        return _stands_alone(given, letter) or _starts(given, words) or _starts(given, f"{letter} {words}")
    return given == wanted


def _stands_alone(text: str, letter: str) -> bool:
    """Whether `text` starts with `letter` and then ends or goes on with a mark: it is no word, like "a"."""
    return re.match(rf"{re.escape(letter)}(?:$|(?!-\w)[^\w\s])", text) is not None


def _starts(text: str, word: str) -> bool:
    """Whether `text` starts with `word`, and not with a longer word ("no-one" is longer than "no")."""
    return re.match(rf"{re.escape(word)}(?!-?\w)", text) is not None


def number(text: str) -> float | None:
    """The one number that `text` names, in digits (1,200 and 3.5 too) or a word up to twenty, else None."""
    folded = _THOUSANDS.sub("", text.casefold())
    found = {float(n) for n in _NUMBER.findall(folded)}
    found |= {float(_WORDS.index(word)) for word in re.findall(r"[a-z]+", folded) if word in _WORDS}
    return found.pop() if len(found) == 1 else None


def box(text: str) -> tuple[float, float, float, float] | None:
    """The first four numbers of `text` as x1, y1, x2, y2 with x1 < x2 and y1 < y2, else None."""
    numbers = [float(n) for n in _NUMBER.findall(text)[:4]]
    if len(numbers) < 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0  # products of tiny sides underflow
