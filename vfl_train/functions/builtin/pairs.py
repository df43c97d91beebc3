"""The six functions of the built-in probes: which cases there are, and how the two images of one are drawn.

A *case* fixes the question and both answers (where these are boxes, so place and size). What it leaves open
(place, size, colours, typeface) is drawn from `rng` once for both images, so that inside a pair nothing
varies but what the function reads.

The contents are those of the papers' visual token swapping. ocr: one word on a plain ground, same font,
size, colour and place; count: more or fewer of one category; grounding: the same object elsewhere;
recognition: the object against a blank image of the same size; emotion and relation: multiple choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from vfl_train.functions.builtin.canvas import COLORS, LIGHT, Canvas, Color, darker, font_of, lighter
from vfl_train.functions.builtin.faces import EXPRESSIONS, HAIR_STYLES, Person, draw_face
from vfl_train.functions.builtin.objects import OBJECTS, SHAPES
from vfl_train.functions.builtin.solids import stand
from vfl_train.functions.builtin.words import FIVE, SIX

T = TypeVar("T")
Case = tuple[Any, ...]
BOXES = ("pixels", "relative-1000")
Rng = np.random.Generator

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol",
)  # fmt: skip
INKS = ("black", "blue", "green", "red", "purple", "brown")
CATEGORIES = ("cube", "sphere", "cylinder")
MAX_COUNT = 6
PLACES = ("top left", "top right", "bottom left", "bottom right")
TARGETS = (
    ("red", "circle"), ("blue", "square"), ("green", "triangle"), ("orange", "star"), ("purple", "heart"),
    ("black", "cross"),
)  # fmt: skip
SOLID_NAMES = {"sphere": "ball", "cube": "box", "cylinder": "cylinder", "cone": "cone"}
DEPTHS = (
    ("red", "sphere", "blue", "cube"), ("green", "cube", "orange", "sphere"),
    ("blue", "cylinder", "red", "cone"), ("purple", "cone", "green", "sphere"),
    ("orange", "cube", "purple", "cylinder"), ("yellow", "sphere", "red", "cylinder"),
)  # fmt: skip
SKINS: tuple[Color, ...] = ((245, 208, 170), (222, 170, 125), (180, 125, 85), (140, 95, 65), (255, 214, 75))
HAIRS: tuple[Color, ...] = ((95, 55, 30), (35, 28, 28), (200, 150, 70), (150, 60, 30), (130, 130, 135))
IRISES: tuple[Color, ...] = ((60, 110, 60), (80, 50, 25), (50, 90, 160))


@dataclass(frozen=True)
class Drawn:
    """A rendered pair: the question, and the right answer and the image of a and of b."""

    question: str
    answers: tuple[str, str]
    images: tuple[Image.Image, Image.Image]
    match: str = "exact"


@dataclass(frozen=True)
class Maker:
    """One function's probes. `cases`: one round of them in random order. `draw`: the pair of a case, images
    of `size` pixels."""

    cases: Callable[[Rng], list[Case]]
    draw: Callable[[Case, Rng, int], Drawn]


def pick(rng: Rng, options: tuple[T, ...]) -> T:
    """One of `options`."""
    return options[int(rng.integers(len(options)))]


def _ground(rng: Rng) -> Color:
    """A light colour; hardly ever the same one twice, so that two blank images differ too."""
    red, green, blue = (int(v) for v in np.array(pick(rng, LIGHT)) - rng.integers(0, 12, size=3))
    return red, green, blue


def _shuffled(rng: Rng, cases: list[Case]) -> list[Case]:
    return [cases[i] for i in rng.permutation(len(cases))]


def choice_question(question: str, options: tuple[str, ...]) -> str:
    """`question` with lettered options below it."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False)]
    return "\n".join([question, *lines, "Answer with the letter of the right option only."])


def choice_answer(options: tuple[str, ...], option: str) -> str:
    """The right answer to a `choice_question`: letter and words, either of which will do."""
    return f"{'ABCDEFGH'[options.index(option)]}. {option}"


# --- recognition: an object, or the empty ground -------------------------------------------------


def recognition_cases(rng: Rng) -> list[Case]:
    """(object, is it in image a)."""
    return _shuffled(rng, list(product(OBJECTS, (True, False))))


def recognition(case: Case, rng: Rng, size: int) -> Drawn:
    """The object on a plain ground, and that ground alone."""
    name, first = case
    drawing, colors = OBJECTS[name]
    background, side, color = _ground(rng), float(rng.uniform(0.45, 0.75)), pick(rng, colors)
    left, top = (float(v) for v in rng.uniform(0.03, 0.97 - side, size=2))

    def image(shown: bool) -> Image.Image:
        canvas = Canvas(size, background)
        if shown:
            drawing(canvas.at(left, top, side), COLORS[color])
        return canvas.finish()

    article = "an" if name[0] in "aeiou" else "a"
    question = f"Is there {article} {name} in the image? Answer yes or no."
    return Drawn(question, ("Yes", "No") if first else ("No", "Yes"), (image(first), image(not first)))


# --- emotion: one face, another expression -------------------------------------------------------

EMOTIONS = tuple(EXPRESSIONS)


def emotion_cases(rng: Rng) -> list[Case]:
    """(expression in a, in b)."""
    return _shuffled(rng, list(permutations(EMOTIONS, 2)))


def emotion(case: Case, rng: Rng, size: int) -> Drawn:
    """A drawn face with one expression and with another. Weaker evidence than photographs: what a drawing
    stands for is partly convention."""
    background, side = _ground(rng), float(rng.uniform(0.6, 0.85))
    person = Person(pick(rng, SKINS), pick(rng, HAIRS), pick(rng, HAIR_STYLES), pick(rng, IRISES))
    left, top = (float(v) for v in rng.uniform(0.04, 0.96 - side, size=2))

    def image(expression: str) -> Image.Image:
        canvas = Canvas(size, background)
        draw_face(canvas.at(left, top, side), person, expression)
        return canvas.finish()

    a, b = case
    question = choice_question("Which emotion does the face show?", EMOTIONS)
    answers = choice_answer(EMOTIONS, a), choice_answer(EMOTIONS, b)
    return Drawn(question, answers, (image(a), image(b)), "choice")


# --- count: more or fewer of one category --------------------------------------------------------


def count_cases(rng: Rng) -> list[Case]:
    """(category, number in a, in b)."""
    numbers = permutations(range(1, MAX_COUNT + 1), 2)
    return _shuffled(rng, [(c, *n) for c, n in product(CATEGORIES, numbers)])


def count(case: Case, rng: Rng, size: int) -> Drawn:
    """Solids in the cells of a 4 x 4 grid. The image with fewer lacks some of the category's solids; all
    others are in both, in place. The other two categories are there 1 to 3 times each."""
    category, a, b = case
    background = _ground(rng)
    targets, others = [category] * max(a, b), []
    for other in CATEGORIES:
        others += [other] * (0 if other == category else int(rng.integers(1, 4)))
    cells = rng.permutation(16)
    placed = [_placed(rng, kind, int(cell)) for kind, cell in zip(targets + others, cells, strict=False)]

    def image(number: int) -> Image.Image:
        canvas = Canvas(size, background)
        for kind, left, top, side, color in placed[:number] + placed[len(targets) :]:
            stand(canvas.at(left, top, side), kind, color, background)
        return canvas.finish()

    question = f"How many {category}s are there in the image? Answer with a number only."
    return Drawn(question, (str(a), str(b)), (image(a), image(b)))


def _placed(rng: Rng, kind: str, cell: int) -> tuple[str, float, float, float, Color]:
    """(kind, left, top, side, colour) of a solid somewhere in its cell."""
    side = float(rng.uniform(0.13, 0.17))
    dx, dy = (float(v) for v in rng.uniform(0.02, 0.23 - side, size=2))
    return kind, cell % 4 / 4 + dx, cell // 4 / 4 + dy, side, COLORS[pick(rng, tuple(COLORS))]


# --- grounding: the same object elsewhere --------------------------------------------------------


def grounding_cases(rng: Rng) -> list[Case]:
    """((colour, shape), place in a, place in b)."""
    return _shuffled(rng, [(t, *p) for t, p in product(TARGETS, permutations(PLACES, 2))])


def boxed_cases(rng: Rng) -> list[Case]:
    """Grounding cases with the object's square, which answers in boxes depend on."""
    return [(*case, *_square(rng)) for case in grounding_cases(rng)]


def _square(rng: Rng) -> tuple[float, float, float]:
    """(side, left and top inside a quarter) of the object, as shares of the image."""
    side = float(rng.uniform(0.20, 0.30))
    left, top = (float(v) for v in rng.uniform(0.06, 0.44 - side, size=2))
    return side, left, top


def grounding_maker(box: str | None) -> Maker:
    """Grounding probes: multiple choice of four places without `box`, else a bounding box x1, y1, x2, y2
    judged by IoU.

    Coordinates by which a family answers (its adapter says so; None where there is no reliable convention):
    - `pixels`, of the image as the model gets it: Qwen2.5-VL (absolute, in the size after the processor: its
      maintainers in QwenLM/Qwen3-VL issues 676 and 782). The built-in images are a multiple of 28 on each
      side, so Qwen's processor leaves them as they are unless --max-pixels makes them smaller.
    - `relative-1000`, from 0 to 1000 on both axes: Qwen2-VL and Qwen3-VL (QwenLM/Qwen3-VL issues 1486, 1741),
      InternVL (OpenGVLab/InternVL issue 844; it writes `[[x1, y1, x2, y2]]`).

    Raises ValueError for another `box`.
    """
    if box not in (None, *BOXES):
        raise ValueError(f"box must be None or one of {', '.join(BOXES)}, not {box!r}")
    scale = {"pixels": "in pixels", "relative-1000": "with coordinates from 0 to 1000"}.get(box or "")

    def draw(case: Case, rng: Rng, size: int) -> Drawn:
        (color, shape), a, b, *square = case
        background = _ground(rng)
        side, dx, dy = square or _square(rng)

        def corner(place: str) -> tuple[float, float]:
            return dx + 0.5 * ("right" in place), dy + 0.5 * ("bottom" in place)

        def image(place: str) -> Image.Image:
            canvas = Canvas(size, background)
            SHAPES[shape](canvas.at(*corner(place), side), COLORS[color])
            return canvas.finish()

        def corners(place: str) -> str:
            left, top = corner(place)
            unit = size if box == "pixels" else 1000
            return ",".join(str(round(v * unit)) for v in (left, top, left + side, top + side))

        images = image(a), image(b)
        if box is not None:
            question = f"Locate the {color} {shape}. Return its bounding box as x1,y1,x2,y2 {scale}."
            return Drawn(question, (corners(a), corners(b)), images, "iou")
        where = "in the top left, top right, bottom left or bottom right of the image"
        question = choice_question(f"Is the {color} {shape} {where}?", PLACES)
        return Drawn(question, (choice_answer(PLACES, a), choice_answer(PLACES, b)), images, "choice")

    return Maker(grounding_cases if box is None else boxed_cases, draw)


# --- relation: which of two is nearer ------------------------------------------------------------


def relation_cases(rng: Rng) -> list[Case]:
    """((colour, solid, colour, solid), is the first nearer in a)."""
    return _shuffled(rng, list(product(DEPTHS, (True, False))))


def relation(case: Case, rng: Rng, size: int) -> Drawn:
    """Two solids on a floor in perspective, one on the left and one on the right; the images differ in
    which of them stands in front. Depth shows in size, in height on the floor, and in some images where
    the nearer one hides a part of the other."""
    (color_1, solid_1, color_2, solid_2), first_nearer = case
    options = tuple(f"the {c} {SOLID_NAMES[s]}" for c, s in ((color_1, solid_1), (color_2, solid_2)))
    solids = ((solid_1, COLORS[color_1]), (solid_2, COLORS[color_2]))
    sky, floor = _ground(rng), darker(_ground(rng), float(rng.uniform(0.12, 0.22)))
    horizon, far = float(rng.uniform(0.30, 0.38)), float(rng.uniform(1.7, 3.2))
    lane = float(rng.uniform(0.10, 0.27)) * (1 if rng.integers(2) else -1)  # of the first solid

    def image(nearer: int) -> Image.Image:
        canvas = Canvas(size, sky)
        _draw_floor(canvas, horizon, floor)
        for which, depth in ((1 - nearer, far), (nearer, 1.0)):  # back to front
            side, x = 0.40 / depth, 0.5 + (lane if which == 0 else -lane) / depth**0.7
            bottom = horizon + (0.93 - horizon) / depth
            stand(canvas.at(x - side / 2, bottom - side, side), *solids[which], floor)
        return canvas.finish()

    a, b = (0, 1) if first_nearer else (1, 0)
    question = choice_question(
        f"Which object is nearer to the camera, {options[0]} or {options[1]}?", options
    )
    answers = choice_answer(options, options[a]), choice_answer(options, options[b])
    return Drawn(question, answers, (image(a), image(b)), "choice")


def _draw_floor(canvas: Canvas, horizon: float, floor: Color) -> None:
    """A tiled floor below `horizon`, its lines running to one vanishing point."""
    canvas.box(0, horizon, 1, 1, lighter(floor, 0.1))
    line = darker(floor, 0.18)
    for i in range(-14, 15):
        canvas.stroke([(0.5, horizon), (0.5 + 0.22 * i, 1.0)], line, 0.004)
    for i in range(9):
        y = horizon + (1 - horizon) / (1 + 0.45 * i)
        canvas.stroke([(0, y), (1, y)], line, 0.004)
    canvas.stroke([(0, horizon), (1, horizon)], line, 0.006)


# --- ocr: another word -----------------------------------------------------------------------------


def ocr_cases(rng: Rng) -> list[Case]:
    """(word in a, in b): equal length, another first letter, no word twice in a round."""
    cases: list[Case] = []
    for words in (FIVE, SIX):
        left = [words[i] for i in rng.permutation(len(words))]
        while left:
            word = left.pop()
            partner = next((w for w in left if w[0] != word[0]), None)
            if partner is not None:
                left.remove(partner)
                cases.append((word, partner))
    return _shuffled(rng, cases)


def ocr(case: Case, rng: Rng, size: int) -> Drawn:
    """One word on a plain ground; both words begin at the same point."""
    background, font, height = _ground(rng), pick(rng, FONTS), float(rng.uniform(0.11, 0.17))
    ink = darker(COLORS[pick(rng, INKS)], 0.3)
    width = max(font_of(font, 100).getlength(word) for word in case) / 100 * height
    x = float(rng.uniform(0.05, 0.95 - width))
    y = float(rng.uniform(0.05 + height, 0.95 - 0.3 * height))

    def image(word: str) -> Image.Image:
        canvas = Canvas(size, background)
        canvas.text(x, y, word, ink, font, height)
        return canvas.finish()

    a, b = case
    return Drawn("Read the text in the image. Answer with the exact word only.", (a, b), (image(a), image(b)))


def makers(box: str | None = None) -> dict[str, Maker]:
    """The six functions by name; `box` as in `grounding_maker`."""
    return {
        "recognition": Maker(recognition_cases, recognition),
        "emotion": Maker(emotion_cases, emotion),
        "count": Maker(count_cases, count),
        "grounding": grounding_maker(box),
        "relation": Maker(relation_cases, relation),
        "ocr": Maker(ocr_cases, ocr),
    }
