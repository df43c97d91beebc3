"""The world the phantom lives in: 64 x 64 pixel scenes with known answers to six visual functions.

A scene holds 1 to 6 objects of one kind, a star, a heart and a face in the cells of a 4 x 3 grid, and
three glyphs of text in the bottom row. Every question fits every scene, so any two scenes make a
swap pair, and a *minimal pair* changes one attribute and nothing else.

The background carries position (red falls with x, green with y): Qwen2.5-VL has rotary positions
only, its values carry none, and without the gradient "where" and "read in order" are not learnt.

What is not covered: overlapping objects, other image sizes, several images in one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vfl_train.phantom.digits import handwritten_digits

T = TypeVar("T")
Color = tuple[int, int, int]
SIZE, CELL, PATCH = 64, 16, 8  # pixels
COLUMNS, ROWS = 4, 3

KINDS = ("circle", "square", "triangle", "cross", "diamond", "ring")
MOODS = ("happy", "sad", "angry", "surprised")
NUMBERS = ("one", "two", "three", "four", "five", "six")
ROW_NAMES = ("upper", "middle", "lower")
COLUMN_NAMES = ("far-left", "left", "right", "far-right")
DIGITS = tuple("0123456789")
GLYPHS = DIGITS + tuple("ACEHKP")

QUESTIONS = {
    "recognition": "what shape are the objects ?",
    "emotion": "how does the face feel ?",
    "count": "how many objects are there ?",
    "grounding": "where is the star ?",
    "relation": "which is nearer , star or heart ?",
    "ocr": "what text is written ?",
}
FUNCTIONS = tuple(QUESTIONS)

# Questions that need no image: the `language` rows of a data pool.
LANGUAGE = (
    tuple((f"which digit follows {d} ?", str(int(d) + 1)) for d in DIGITS[:9])
    + tuple((f"which digit precedes {d} ?", str(int(d) - 1)) for d in DIGITS[1:])
    + tuple((f"please repeat {g} ?", g) for g in GLYPHS)
)

PALETTE = ((30, 60, 200), (180, 30, 30), (20, 120, 40), (120, 30, 150), (20, 20, 20), (150, 80, 10))
INKS = ((20, 20, 20), (30, 30, 120), (110, 20, 20), (20, 80, 30))
GOLD, RED, YELLOW, DARK = (225, 150, 0), (200, 20, 60), (250, 215, 70), (40, 30, 10)
NEAR, FAR = 14, 9  # drawn size in pixels of the nearer and the farther of star and heart
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "STIXGeneralBol", "cmss10", "cmtt10",
)  # fmt: skip
FONT_SIZES = (13, 14, 15, 16)
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object of the scene: its cell (0 to 11, row-major), offset in pixels, size and colour."""

    cell: int
    offset: tuple[int, int]
    size: int
    color: Color


@dataclass(frozen=True)
class Text:
    """Three glyphs in the bottom row. `source` names a font, `wide` (distorted fonts) or `digits`
    (handwritten); `seed` fixes jitter and, for `wide` and `digits`, the specimen."""

    glyphs: tuple[str, str, str]
    source: str
    size: int
    color: Color
    seed: int


@dataclass(frozen=True)
class Scene:
    """A complete description: `render` and `answer` are functions of it alone."""

    kind: str
    objects: tuple[Thing, ...]
    star: Thing
    heart: Thing
    face: Thing
    mood: str
    text: Text
    split: str = "train"  # which half of the handwritten digits `digits` specimens come from


def answer(scene: Scene, function: str) -> str:
    """The right answer to `QUESTIONS[function]`, space-separated words. Raises KeyError if unknown."""
    row, column = divmod(scene.star.cell, COLUMNS)
    return {
        "recognition": lambda: scene.kind,
        "emotion": lambda: scene.mood,
        "count": lambda: NUMBERS[len(scene.objects) - 1],
        "grounding": lambda: f"{ROW_NAMES[row]} {COLUMN_NAMES[column]}",
        "relation": lambda: "star" if scene.star.size > scene.heart.size else "heart",
        "ocr": lambda: " ".join(scene.text.glyphs),
    }[function]()


def _pick(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    return options[int(rng.integers(len(options)))]


def _glyphs(rng: np.random.Generator, alphabet: tuple[str, ...]) -> tuple[str, str, str]:
    return _pick(rng, alphabet), _pick(rng, alphabet), _pick(rng, alphabet)


def _thing(rng: np.random.Generator, cell: int, size: int, color: Color, jitter: int) -> Thing:
    dx, dy = rng.integers(-jitter, jitter + 1, size=2)
    return Thing(int(cell), (int(dx), int(dy)), size, color)


def sample_scene(rng: np.random.Generator, text_source: str = "fonts", split: str = "train") -> Scene:
    """A random scene. `text_source`: `fonts` (printed), `wide` (distorted print) or `digits`
    (handwritten digits of `split`; the objects are then handwritten digits too)."""
    cells = rng.permutation(COLUMNS * ROWS)
    near_is_star = bool(rng.integers(2))
    count = int(rng.integers(1, 7))
    objects = tuple(
        _thing(rng, cell, int(rng.integers(9, 13)), _pick(rng, PALETTE), 2) for cell in cells[3 : 3 + count]
    )
    alphabet = DIGITS if text_source == "digits" else GLYPHS
    return Scene(
        kind="digit" if text_source == "digits" else _pick(rng, KINDS),
        objects=objects,
        star=_thing(rng, cells[0], NEAR if near_is_star else FAR, GOLD, 1),
        heart=_thing(rng, cells[1], FAR if near_is_star else NEAR, RED, 1),
        face=_thing(rng, cells[2], 14, YELLOW, 1),
        mood=_pick(rng, MOODS),
        text=Text(
            _glyphs(rng, alphabet),
            _pick(rng, FONTS) if text_source == "fonts" else text_source,
            _pick(rng, FONT_SIZES),
            _pick(rng, INKS),
            int(rng.integers(2**31)),
        ),
        split=split,
    )


def vary(scene: Scene, function: str, rng: np.random.Generator) -> Scene:
    """The other half of a minimal pair: `scene` with a different answer to `function`'s question and
    everything else unchanged (star and heart trade sizes, objects are added or removed, ...)."""
    if function == "recognition":
        return replace(scene, kind=_other(rng, KINDS, scene.kind))
    if function == "emotion":
        return replace(scene, mood=_other(rng, MOODS, scene.mood))
    if function == "relation":
        star, heart = scene.star, scene.heart
        return replace(scene, star=replace(star, size=heart.size), heart=replace(heart, size=star.size))
    if function == "ocr":
        alphabet = DIGITS if scene.text.source == "digits" else GLYPHS
        glyphs = _glyphs(rng, alphabet)
        if glyphs == scene.text.glyphs:
            return vary(scene, function, rng)
        return replace(scene, text=replace(scene.text, glyphs=glyphs))
    taken = {t.cell for t in (*scene.objects, scene.star, scene.heart, scene.face)}
    free = [c for c in rng.permutation(COLUMNS * ROWS) if int(c) not in taken]
    if function == "grounding":
        return replace(scene, star=replace(scene.star, cell=int(free[0])))
    if function == "count":
        count = 1 + NUMBERS.index(_other(rng, NUMBERS, NUMBERS[len(scene.objects) - 1]))
        extra = tuple(
            _thing(rng, c, int(rng.integers(9, 13)), _pick(rng, PALETTE), 2)
            for c in free[: max(0, count - len(scene.objects))]
        )
        return replace(scene, objects=(scene.objects + extra)[:count])
    raise KeyError(function)


def same_answer(scene: Scene, function: str, rng: np.random.Generator) -> Scene:
    """A *nuisance* partner: another scene with the same answer to `function`'s question."""
    source = scene.text.source
    other = sample_scene(rng, source if source in ("wide", "digits") else "fonts", scene.split)
    if function == "recognition":
        return replace(other, kind=scene.kind)
    if function == "emotion":
        return replace(other, mood=scene.mood)
    if function == "relation":
        return replace(
            other,
            star=replace(other.star, size=scene.star.size),
            heart=replace(other.heart, size=scene.heart.size),
        )
    if function == "ocr":
        return replace(other, text=replace(other.text, glyphs=scene.text.glyphs))
    wanted = answer(scene, function)
    while answer(other, function) != wanted:
        other = sample_scene(rng, source if source in ("wide", "digits") else "fonts", scene.split)
    return other


def _other(rng: np.random.Generator, options: tuple[str, ...], current: str) -> str:
    return str(_pick(rng, tuple(o for o in options if o != current)))


def minimal_pairs(
    function: str, pairs: int, seed: int, text_source: str = "fonts", split: str = "train"
) -> Iterator[tuple[Scene, Scene]]:
    """`pairs` minimal pairs. They come in twos with equal answers on different scenes, so that each
    image has a same-answer partner in the set for the nuisance control."""
    rng = np.random.default_rng([seed, FUNCTIONS.index(function)])
    for index in range((pairs + 1) // 2):
        a = sample_scene(rng, text_source, split)
        b = vary(a, function, rng)
        yield a, b
        if pairs % 2 and index == pairs // 2:
            return
        yield _same_answers(a, b, function, rng)


def _same_answers(a: Scene, b: Scene, function: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Another minimal pair that gives the answers of `a` and `b`."""
    one = same_answer(a, function, rng)
    if function == "ocr":
        return one, replace(one, text=replace(one.text, glyphs=b.text.glyphs))
    if function == "grounding":
        one = _cleared(one, b.star.cell, rng)
        return one, replace(one, star=replace(one.star, cell=b.star.cell))
    two = vary(one, function, rng)
    while answer(two, function) != answer(b, function):
        two = vary(one, function, rng)
    return one, two


def _cleared(scene: Scene, cell: int, rng: np.random.Generator) -> Scene:
    """`scene` with whatever stands in `cell` moved to a free one."""
    taken = {t.cell for t in (*scene.objects, scene.star, scene.heart, scene.face)}
    free = int(next(c for c in rng.permutation(COLUMNS * ROWS) if int(c) not in taken | {cell}))

    def moved(thing: Thing) -> Thing:
        return replace(thing, cell=free) if thing.cell == cell else thing

    objects = tuple(map(moved, scene.objects))
    return replace(scene, objects=objects, heart=moved(scene.heart), face=moved(scene.face))


# --- drawing -----------------------------------------------------------------------------------


def _center(thing: Thing) -> tuple[int, int]:
    row, column = divmod(thing.cell, COLUMNS)
    return column * CELL + CELL // 2 + thing.offset[0], row * CELL + CELL // 2 + thing.offset[1]


def _mask(size: int, draw: str) -> np.ndarray:
    """Coverage of a drawn shape, float32 in 0..1, [size, size]."""
    n = size * SUPERSAMPLE
    image = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(image)
    e = n - 1
    if draw in ("circle", "disc"):
        pen.ellipse((0, 0, e, e), fill=255)
    elif draw == "square":
        pen.rectangle((n * 0.06, n * 0.06, e - n * 0.06, e - n * 0.06), fill=255)
    elif draw == "triangle":
        pen.polygon([(e / 2, 0), (e, e), (0, e)], fill=255)
    elif draw == "cross":
        pen.rectangle((n * 0.35, 0, e - n * 0.35, e), fill=255)
        pen.rectangle((0, n * 0.35, e, e - n * 0.35), fill=255)
    elif draw == "diamond":
        pen.polygon([(e / 2, 0), (e * 0.92, e / 2), (e / 2, e), (e * 0.08, e / 2)], fill=255)
    elif draw == "ring":
        pen.ellipse((0, 0, e, e), fill=255)
        pen.ellipse((n * 0.27, n * 0.27, e - n * 0.27, e - n * 0.27), fill=0)
    elif draw == "star":
        points = [
            (e / 2 * (1 + r * np.sin(a)), e / 2 * (1 - r * np.cos(a)))
            for i in range(10)
            for r, a in [((1.0, 0.42)[i % 2], np.pi * i / 5)]
        ]
        pen.polygon(points, fill=255)
    elif draw == "heart":
        pen.ellipse((0, 0, e * 0.54, e * 0.56), fill=255)
        pen.ellipse((e * 0.46, 0, e, e * 0.56), fill=255)
        pen.polygon([(e * 0.04, e * 0.42), (e * 0.96, e * 0.42), (e / 2, e)], fill=255)
    else:
        _draw_mood(pen, n, draw)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def _draw_mood(pen: ImageDraw.ImageDraw, n: int, mood: str) -> None:
    """Eyes, brows and mouth of one mood on an n x n canvas."""
    e, w = n - 1, max(2, n // 9)
    big = 0.11 if mood == "surprised" else 0.075
    for x in (0.32, 0.68):
        pen.ellipse((e * (x - big), e * (0.36 - big), e * (x + big), e * (0.36 + big)), fill=255)
    if mood == "happy":
        pen.arc((e * 0.22, e * 0.30, e * 0.78, e * 0.84), 20, 160, fill=255, width=w)
    elif mood == "sad":
        pen.arc((e * 0.25, e * 0.62, e * 0.75, e * 1.10), 205, 335, fill=255, width=w)
    elif mood == "angry":
        pen.line((e * 0.16, e * 0.14, e * 0.44, e * 0.28), fill=255, width=w)
        pen.line((e * 0.84, e * 0.14, e * 0.56, e * 0.28), fill=255, width=w)
        pen.line((e * 0.30, e * 0.74, e * 0.70, e * 0.74), fill=255, width=w)
    else:
        pen.ellipse((e * 0.36, e * 0.56, e * 0.64, e * 0.90), fill=255)


_shape = lru_cache(maxsize=512)(_mask)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


@lru_cache(maxsize=4096)
def _printed(glyph: str, font: str, size: int) -> np.ndarray:
    """Coverage of one printed glyph centred on a 16 x 16 tile, float32 in 0..1."""
    image = Image.new("L", (CELL, CELL), 0)
    ImageDraw.Draw(image).text((CELL / 2, CELL / 2), glyph, fill=255, font=_font(font, size), anchor="mm")
    return np.asarray(image, dtype=np.float32) / 255


def _distorted(glyph: str, rng: np.random.Generator) -> np.ndarray:
    """A printed glyph bent, thickened and reduced to 8 x 8 like a scanned one, float32 [16, 16]."""
    big = Image.new("L", (64, 64), 0)
    font = _font(_pick(rng, FONTS), int(rng.integers(44, 64)))
    stroke = int(rng.integers(0, 4))
    ImageDraw.Draw(big).text((32, 32), glyph, fill=255, font=font, anchor="mm", stroke_width=stroke)
    angle, shear = rng.normal(0, 0.14), rng.normal(0, 0.18)
    sx, sy = rng.uniform(0.8, 1.35, size=2)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = matrix @ np.array([[1, shear], [0, 1]]) @ np.diag([sx, sy])
    shift = 32 - matrix @ np.array([32, 32]) + rng.normal(0, 2, size=2)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    big = big.transform((64, 64), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    if rng.random() < 0.7:
        big = big.resize((8, 8), Image.Resampling.BOX)
    return np.asarray(big.resize((CELL, CELL), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _handwritten(glyph: str, rng: np.random.Generator, split: str) -> np.ndarray:
    """A handwritten specimen of a digit from `split`, float32 [16, 16]."""
    specimens = handwritten_digits(split)[int(glyph)]
    tile = Image.fromarray(specimens[int(rng.integers(len(specimens)))])
    return np.asarray(tile.resize((CELL, CELL), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _glyph(text: Text, index: int, rng: np.random.Generator, split: str) -> np.ndarray:
    glyph = text.glyphs[index]
    if text.source == "digits":
        return _handwritten(glyph, rng, split)
    if text.source == "wide":
        return _distorted(glyph, rng)
    return _printed(glyph, text.source, text.size)


def _layers(scene: Scene) -> Iterator[tuple[str, np.ndarray, Color, int, int]]:
    """(label, coverage, colour, left, top) of everything drawn, back to front."""
    for index, thing in enumerate(scene.objects):
        x, y = _center(thing)
        if scene.kind == "digit":
            tile_rng = np.random.default_rng([scene.text.seed, 7, thing.cell, index])
            digit = str(int(tile_rng.integers(10)))
            tile = _handwritten(digit, tile_rng, scene.split)
            yield "object", tile, thing.color, x - CELL // 2, y - CELL // 2
            continue
        half = thing.size // 2
        yield scene.kind, _shape(thing.size, scene.kind), thing.color, x - half, y - half
    for label, thing in (("star", scene.star), ("heart", scene.heart), ("face", scene.face)):
        (x, y), half = _center(thing), thing.size // 2
        name = scene.mood if label == "face" else f"{label}-{'near' if thing.size == NEAR else 'far'}"
        shape = "disc" if label == "face" else label
        yield name, _shape(thing.size, shape), thing.color, x - half, y - half
        if label == "face":
            yield name, _shape(thing.size, scene.mood), DARK, x - half, y - half
    rng = np.random.default_rng(scene.text.seed)
    for index, glyph in enumerate(scene.text.glyphs):
        dx, dy = rng.integers(-2, 3), rng.integers(-1, 2)
        specimen_rng = np.random.default_rng([scene.text.seed, index])
        tile = _glyph(scene.text, index, specimen_rng, scene.split)
        yield glyph, tile, scene.text.color, 4 + 20 * index + int(dx), ROWS * CELL + int(dy)


@lru_cache(maxsize=1)
def _background() -> np.ndarray:
    ramp = np.linspace(255, 165, SIZE, dtype=np.float32)
    canvas = np.full((SIZE, SIZE, 3), 210, dtype=np.float32)
    canvas[:, :, 0], canvas[:, :, 1] = ramp[None, :], ramp[:, None]
    return canvas


def _paste(tile: np.ndarray, left: int, top: int) -> tuple[slice, slice, np.ndarray]:
    """The part of `tile` that falls on the canvas, with its row and column slices."""
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(SIZE, top + tile.shape[0]), min(SIZE, left + tile.shape[1])
    return slice(y0, y1), slice(x0, x1), tile[y0 - top : y1 - top, x0 - left : x1 - left]


def draw(scene: Scene) -> np.ndarray:
    """The scene as pixels, uint8 [64, 64, 3]."""
    return _paint(list(_layers(scene)))


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image."""
    return Image.fromarray(draw(scene))


def _paint(layers: list[tuple[str, np.ndarray, Color, int, int]]) -> np.ndarray:
    canvas = _background().copy()
    for _, tile, color, left, top in layers:
        rows, columns, part = _paste(tile, left, top)
        alpha = part[:, :, None]
        canvas[rows, columns] = canvas[rows, columns] * (1 - alpha) + np.asarray(color, np.float32) * alpha
    return canvas.round().astype(np.uint8)


LABELS = ("nothing", *KINDS, "object", *MOODS, "star-near", "star-far", "heart-near", "heart-far", *GLYPHS)


def draw_labelled(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels uint8 [64, 64, 3], labels int64 [64], centres bool [64]). The labels say what each 8 x 8 patch
    shows, row-major indices into LABELS: the thing that covers most of the patch if it covers at least 6 %
    of it. The centres mark the patch that holds an object's middle. Supervision for the tower alone."""
    layers = list(_layers(scene))
    side = SIZE // PATCH
    best = np.full((side, side), 0.06, dtype=np.float32)
    labels = np.zeros((side, side), dtype=np.int64)
    for name, tile, _, left, top in layers:
        rows, columns, part = _paste(tile, left, top)
        y, x = rows.start // PATCH, columns.start // PATCH
        h, w = -(-rows.stop // PATCH) - y, -(-columns.stop // PATCH) - x
        window = np.zeros((h * PATCH, w * PATCH), dtype=np.float32)
        window[rows.start - y * PATCH : rows.stop - y * PATCH, columns.start - x * PATCH : columns.stop - x * PATCH] = part  # fmt: skip # noqa: E501
        share = window.reshape(h, PATCH, w, PATCH).mean(axis=(1, 3))
        here = best[y : y + h, x : x + w]
        wins = share > here
        labels[y : y + h, x : x + w][wins] = LABELS.index(name)
        here[wins] = share[wins]
    centres = np.zeros((side, side), dtype=bool)
    for thing in scene.objects:
        x, y = _center(thing)
        centres[y // PATCH, x // PATCH] = True
    return _paint(layers), labels.reshape(-1), centres.reshape(-1)


def vocabulary() -> tuple[str, ...]:
    """Every word of every question and answer, sorted: the phantom's tokenizer is word-level."""
    words = {w for q in QUESTIONS.values() for w in q.split()}
    words |= {w for q, a in LANGUAGE for w in (q + " " + a).split()}
    words |= {*KINDS, *MOODS, *NUMBERS, *ROW_NAMES, *COLUMN_NAMES, *GLYPHS, "star", "heart", "digit"}
    return tuple(sorted(words))
