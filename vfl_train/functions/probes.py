"""Probe sets: folders of image pairs (or pairs of videos, as lists of frames), one question and two answers a
pair.

A probe set is a measuring instrument, so a set with a bad pair is refused as a whole, naming the line;
`vfl-train probes check DIR` lists everything that is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from vfl_train.data.images import open_image, resolve_image
from vfl_train.data.rows import ImageRef, one_line
from vfl_train.data.videos import check_frame_count, open_videos
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.matching import box as box_of
from vfl_train.functions.matching import matches, normalise
from vfl_train.schemas import BUILTIN_FUNCTIONS, ProbePair, check_function_name

PAIRS_FILE = "pairs.jsonl"
Picture = Image.Image | ImageRef  # decoded, or a file
Source = Picture | tuple[Picture, ...]  # a tuple: the frames of a video
Shown = tuple[list[Image.Image], list[list[Image.Image]]]  # images and videos, as a prompt takes them


@dataclass(frozen=True)
class LoadedPair:
    """A probe pair with its line number and two images of equal size, or two videos of as many frames:
    decoded ones, or files that are decoded at each access, so that the pixels of a large set are not held."""

    line: int
    pair: ProbePair
    source_a: Source
    source_b: Source

    @property
    def shown_a(self) -> Shown:
        """RGB. Raises DataError if a file cannot be read (any more)."""
        return decoded(self.source_a)

    @property
    def shown_b(self) -> Shown:
        """As `shown_a`."""
        return decoded(self.source_b)

    @property
    def image_a(self) -> Image.Image:
        """The image, or the first frame of the video. Raises as `shown_a`."""
        return pictures(self.shown_a)[0]

    @property
    def image_b(self) -> Image.Image:
        """As `image_a`."""
        return pictures(self.shown_b)[0]


def decoded(source: Source) -> Shown:
    """What is shown of a side of a pair. Raises DataError if a file cannot be read."""
    if not isinstance(source, tuple):
        return [open_image(source) if isinstance(source, ImageRef) else source], []
    files = [frame for frame in source if isinstance(frame, ImageRef)]
    return [], open_videos([files]) if files else [[f for f in source if not isinstance(f, ImageRef)]]


def pictures(shown: Shown) -> list[Image.Image]:
    """The image, or every frame."""
    images, videos = shown
    return [*images, *(frame for frames in videos for frame in frames)]


def _pixels(shown: Shown) -> bytes:
    return b"".join(picture.tobytes() for picture in pictures(shown))


@dataclass(frozen=True)
class BadPair:
    """Why a line of a pair file cannot be used."""

    line: int
    reason: str


@dataclass(frozen=True)
class ProbeSet:
    """The pairs of each function, in file order. `sha256` covers the pair file and every image; `available`
    says how many pairs of each function the folder holds (empty for sets that were drawn)."""

    name: str
    sha256: str
    pairs: dict[str, list[LoadedPair]]
    available: dict[str, int] = field(default_factory=dict)


def scan(folder: Path) -> Iterator[LoadedPair | BadPair]:
    """Every non-empty line of the pair file: usable, with decoded images, or the reason why not. Raises
    ConfigError if there is no pair file."""
    path = folder / PAIRS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {PAIRS_FILE}", "give a probe folder (see the README)")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            pair = _parse(line)
            a, b = (decoded(_source(p, folder)) for p in (pair.image_a, pair.image_b))
            _check_pair(pair, a, b)
        except DataError as e:
            yield BadPair(number, one_line(e.message))
        else:
            yield LoadedPair(
                number, pair, *(images[0] if images else tuple(videos[0]) for images, videos in (a, b))
            )


def _source(paths: str | tuple[str, ...], folder: Path) -> ImageRef | tuple[ImageRef, ...]:
    """The files of an image or of a video's frames. Raises DataError."""
    if isinstance(paths, str):
        return resolve_image(paths, folder)
    check_frame_count([len(paths)])
    return tuple(resolve_image(path, folder) for path in paths)


def _parse(line: bytes) -> ProbePair:
    """The pair of one line. Raises DataError for what is no JSON object with the right keys."""
    try:
        pair = ProbePair.from_json(json.loads(line.decode("utf-8"), object_pairs_hook=_unique))
        for value in vars(pair).values():
            "".join(value).encode("utf-8")
    except UnicodeDecodeError:
        raise DataError("not valid UTF-8") from None
    except UnicodeEncodeError:
        raise DataError("a text holds half of a surrogate pair") from None
    except RecursionError:
        raise DataError("not valid JSON: nested too deep") from None
    except ValueError as e:  # also a number of more digits than Python converts
        raise DataError(f"not valid JSON: {e}") from None
    return pair


def _unique(items: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's keys and values. Raises DataError for a key given twice: which one counts would be a
    guess."""
    found = dict(items)
    if len(found) < len(items):
        raise DataError("a key is given twice")
    return found


def _check_pair(pair: ProbePair, a: Shown, b: Shown) -> None:
    """Raises DataError where a swap between the images could not be done or could show nothing."""
    frames = [len(videos[0]) if videos else 0 for _, videos in (a, b)]
    if frames[0] != frames[1]:
        raise DataError(f"image_a has {frames[0]} frames and image_b {frames[1]}: they must be equal")
    sizes = [pictures(shown)[0].size for shown in (a, b)]
    if sizes[0] != sizes[1]:
        named = [n if isinstance(n, str) else n[0] for n in (pair.image_a, pair.image_b)]
        said = [f"{name} is {width} x {height}" for name, (width, height) in zip(named, sizes, strict=True)]
        raise DataError(f"{' and '.join(said)} pixels: sizes must be equal")
    if pair.match == "iou":
        for key in ("answer_a", "answer_b"):
            if box_of(getattr(pair, key)) is None:
                raise DataError(f"{key} is no box x1,y1,x2,y2 with x1 < x2 and y1 < y2, as match iou needs")
    else:
        for key in ("answer_a", "answer_b"):
            if not normalise(getattr(pair, key)):
                raise DataError(f"{key} has no letter and no digit: every output would match, or none")
    answers = pair.answer_a, pair.answer_b
    if matches(*answers, pair.match) or matches(*answers[::-1], pair.match):
        raise DataError("both images have the same answer: a swap could change nothing")
    if _pixels(a) == _pixels(b):
        raise DataError("both images show the same pixels: a swap could change nothing")


def load_probe_set(folder: Path, functions: Sequence[str] = (), limit: int | None = None) -> ProbeSet:
    """The pairs of `functions` (all if empty), at most `limit` each. Every image is decoded once to check and
    hash it, and let go: the pairs keep references to the files.

    Raises DataError (file, line, reason) for the first bad pair, ConfigError for a function without pairs.
    """
    pairs: dict[str, list[LoadedPair]] = {}
    digest = hashlib.sha256((folder / PAIRS_FILE).read_bytes() if (folder / PAIRS_FILE).is_file() else b"")
    for found in scan(folder):
        if isinstance(found, BadPair):
            raise DataError(
                f"{folder / PAIRS_FILE} line {found.line}: {found.reason}",
                f"mend or remove it; `vfl-train probes check {folder}` lists every bad pair",
            )
        digest.update(_pixels(found.shown_a) + _pixels(found.shown_b))
        a, b = (_source(p, folder) for p in (found.pair.image_a, found.pair.image_b))
        pairs.setdefault(found.pair.function, []).append(replace(found, source_a=a, source_b=b))
    chosen = _choose(pairs, functions, limit)
    available = {name: len(pairs[name]) for name in chosen}
    return ProbeSet(folder.resolve().name, digest.hexdigest(), chosen, available)


def _choose(
    pairs: dict[str, list[LoadedPair]], functions: Sequence[str], limit: int | None
) -> dict[str, list[LoadedPair]]:
    wanted = [check_function_name(f) for f in functions] or list(pairs)
    for name in wanted:
        if name not in pairs:
            raise ConfigError(
                f"there are no probe pairs for function {name!r}", f"the set has {', '.join(pairs) or 'none'}"
            )
    if not wanted:
        raise DataError("the probe set holds no pairs")
    return {name: pairs[name][:limit] for name in wanted}


def builtin_probe_set(
    functions: Sequence[str], pairs: int, seed: int, *, world: str | None = None, box: str | None = None
) -> ProbeSet:
    """`pairs` minimal pairs of each function (all six if none is named).

    `world`: the drawn world a model was trained in (`VisionLanguageModel.world`). The phantom's gives scenes
    unseen in its training, None the pictures of `functions.builtin`. `box`: coordinates by which the model
    answers grounding questions, None for a multiple choice (see `builtin.pairs.grounding_maker`). Raises
    ConfigError for unknown functions.
    """
    wanted = [check_function_name(f) for f in functions] or list(BUILTIN_FUNCTIONS)
    for name in wanted:
        if name not in BUILTIN_FUNCTIONS:
            raise ConfigError(f"unknown function {name!r}", f"built in are {', '.join(BUILTIN_FUNCTIONS)}")
    if world == "phantom":
        from vfl_train.phantom import datasets

        return datasets.probe_set(dict.fromkeys(wanted, pairs), seed)
    from vfl_train.functions import builtin

    return builtin.probe_set(wanted, pairs, seed, box)


def save_probe_set(probes: ProbeSet, folder: Path) -> None:
    """Write a probe set as a folder that `load_probe_set` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for loaded in (p for pairs in probes.pairs.values() for p in pairs):
        for shown, paths in ((loaded.shown_a, loaded.pair.image_a), (loaded.shown_b, loaded.pair.image_b)):
            names = (paths,) if isinstance(paths, str) else paths
            for picture, name in zip(pictures(shown), names, strict=True):
                picture.save(folder / name)
        lines.append(json.dumps(vars(loaded.pair)))
    (folder / PAIRS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def most_pairs(pairs: int, limit: int | None) -> int:
    """Pairs a function under --pairs and --limit."""
    return pairs if limit is None else min(pairs, limit)
