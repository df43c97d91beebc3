"""Probe sets: folders of image pairs, one question and two answers a pair.

A probe set is a measuring instrument, so a set with a bad pair is refused as a whole, naming the line;
`vfl-train probes check DIR` lists everything that is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vfl_train.data.images import open_image, resolve_image
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.matching import matches
from vfl_train.schemas import BUILTIN_FUNCTIONS, ProbePair, check_function_name

PAIRS_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class LoadedPair:
    """A probe pair with its line number and decoded images of equal size."""

    line: int
    pair: ProbePair
    image_a: Image.Image
    image_b: Image.Image


@dataclass(frozen=True)
class BadPair:
    """Why a line of a pair file cannot be used."""

    line: int
    reason: str


@dataclass(frozen=True)
class ProbeSet:
    """The pairs of each function, in file order. `sha256` covers the pair file and every image."""

    name: str
    sha256: str
    pairs: dict[str, list[LoadedPair]]


def scan(folder: Path) -> Iterator[LoadedPair | BadPair]:
    """Every non-empty line of the pair file: usable or the reason why not. Raises ConfigError if there is
    no pair file."""
    path = folder / PAIRS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {PAIRS_FILE}", "give a probe folder (see the README)")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            pair = ProbePair.from_json(json.loads(line.decode("utf-8")))
            a, b = (open_image(resolve_image(p, folder)) for p in (pair.image_a, pair.image_b))
        except UnicodeDecodeError:
            yield BadPair(number, "not valid UTF-8")
        except (json.JSONDecodeError, RecursionError) as e:
            yield BadPair(number, f"not valid JSON: {e}")
        except DataError as e:  # a wrong key, or an image that is refused
            yield BadPair(number, e.message)
        else:
            if a.size != b.size:
                yield BadPair(number, f"image_a is {a.size} and image_b {b.size} pixels: sizes must be equal")
            elif matches(pair.answer_b, pair.answer_a, pair.match):
                yield BadPair(number, "both images have the same answer: a swap could change nothing")
            else:
                yield LoadedPair(number, pair, a, b)


def load_probe_set(folder: Path, functions: Sequence[str] = (), limit: int | None = None) -> ProbeSet:
    """The pairs of `functions` (all if empty), at most `limit` each.

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
        digest.update(found.image_a.tobytes() + found.image_b.tobytes())
        kept = pairs.setdefault(found.pair.function, [])
        if limit is None or len(kept) < limit:  # the others' images need not stay in memory
            kept.append(found)
    return ProbeSet(folder.name, digest.hexdigest(), _choose(pairs, functions, limit))


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


def builtin_probe_set(model_name: str, functions: Sequence[str], pairs: int, seed: int) -> ProbeSet:
    """Minimal pairs rendered from the phantom's world, `pairs` a function, unseen in its training.
    Raises ConfigError for other models and unknown functions."""
    from vfl_train.phantom.datasets import probe_set

    if not model_name.startswith("phantom"):
        raise ConfigError(
            "built-in probe pairs exist for the phantom only so far", "give your own with --probes DIR"
        )
    wanted = [check_function_name(f) for f in functions] or list(BUILTIN_FUNCTIONS)
    for name in wanted:
        if name not in BUILTIN_FUNCTIONS:
            raise ConfigError(f"unknown function {name!r}", f"built in are {', '.join(BUILTIN_FUNCTIONS)}")
    return probe_set(dict.fromkeys(wanted, pairs), seed)


def save_probe_set(probes: ProbeSet, folder: Path) -> None:
    """Write a probe set as a folder that `load_probe_set` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for loaded in (p for pairs in probes.pairs.values() for p in pairs):
        loaded.image_a.save(folder / loaded.pair.image_a)
        loaded.image_b.save(folder / loaded.pair.image_b)
        lines.append(json.dumps(vars(loaded.pair)))
    (folder / PAIRS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
