"""The built-in probe set: pairs of six functions, the same for equal arguments.

Pair `i` depends on the seed, the function and `i` alone: a smaller set is the beginning of a larger one.
Pairs come in twos with the same question and answers, all else drawn anew, so that every image has a donor
with its own answer and another picture (the nuisance control).

Pixels of text depend on the versions of Pillow and FreeType; the set's sha256 says whether two runs saw the
same pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from vfl_train.errors import ConfigError
from vfl_train.functions.builtin.canvas import SIZE
from vfl_train.functions.builtin.pairs import Case, Drawn, Maker, makers
from vfl_train.functions.probes import LoadedPair, ProbeSet
from vfl_train.schemas import BUILTIN_FUNCTIONS, ProbePair

NAME = "builtin-1"  # changes with the pictures: profiles of different sets are not comparable


def probe_set(
    functions: Sequence[str] = BUILTIN_FUNCTIONS,
    pairs: int = 100,
    seed: int = 0,
    box: str | None = None,
    size: int = SIZE,
) -> ProbeSet:
    """`pairs` minimal pairs for each of `functions`, RGB images of `size` x `size` pixels.

    `box`: the coordinates in which the model answers grounding questions (`pixels`, `relative-1000`); None
    asks for one of four places instead. An image takes about 4 size^2 bytes, so 100 pairs of all six
    functions are 1 GB. Raises ConfigError for an unknown function, ValueError for an unknown `box`.
    """
    known, found, line = makers(box), {}, 0
    digest = hashlib.sha256()
    for function in functions:
        if function not in known:
            raise ConfigError(
                f"unknown function {function!r}", f"built in are {', '.join(BUILTIN_FUNCTIONS)}"
            )
        loaded = []
        for i, drawn in enumerate(_draw(known[function], function, pairs, seed, size)):
            line += 1
            name = f"{function}-{i:03d}"
            pair = ProbePair(
                function, f"{name}-a.png", f"{name}-b.png",
                drawn.question, *drawn.answers, drawn.match,
            )  # fmt: skip
            digest.update(json.dumps(vars(pair)).encode())
            for image in drawn.images:
                digest.update(image.tobytes())
            loaded.append(LoadedPair(line, pair, *drawn.images))
        found[function] = loaded
    return ProbeSet(NAME, digest.hexdigest(), found)


def _draw(maker: Maker, function: str, pairs: int, seed: int, size: int) -> Iterator[Drawn]:
    key = [seed, BUILTIN_FUNCTIONS.index(function)]
    cases: list[Case] = []
    for i in range(pairs):
        while len(cases) <= i // 2:  # a round of all cases after the other
            cases += maker.cases(np.random.default_rng([*key, 0, len(cases)]))
        yield maker.draw(cases[i // 2], np.random.default_rng([*key, 1, i]), size)
