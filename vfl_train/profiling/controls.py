"""Swaps that should change nothing, and swaps that are no fair floor but say what a stranger's image does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from vfl_train.functions.matching import matches
from vfl_train.interventions import NOISE, Prompt, swap
from vfl_train.profiling.sweep import DONOR, AnsweredPair, Ask, Sweeper
from vfl_train.schemas import PROFILE_CONTROLS

CACHED = 8  # partners' prompts held at once

Side = tuple[int, int]  # index of an answered pair; 0 for its image a, 1 for b


def controls(
    sweeper: Sweeper, answered: Sequence[AnsweredPair], pairs: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Change rate per layer of swaps with the host itself (`self`), with another pair's image of the same
    question and answer (`nuisance`) or of another answer (`unrelated`), and with `noise`, over the first
    `pairs` answered pairs; and how many directions each rests on. Empty where no direction has such a donor.

    `noise` is one fixed draw, the same in every run and independent of the profile's seed.
    """
    depth = sweeper.vlm.num_layers
    layers = range(depth)
    rates: dict[str, list[list[bool]]] = {name: [] for name in PROFILE_CONTROLS}

    @lru_cache(maxsize=CACHED)
    def prompt_of(side: Side) -> Prompt:
        return sweeper.encode(answered[side[0]].loaded)[side[1]]

    hosts = ((i, side) for i in range(len(answered)) for side in (0, 1))
    for chunk in sweeper.again(answered[:pairs]):
        asks: list[Ask] = []
        names: list[str] = []
        for d in (d for both in chunk for d in both):
            host = next(hosts)
            donors = {
                "self": replace(d.host),  # a copy: a donor that is the host would be run as if plain
                "nuisance": _prompt(partner(answered, host, same=True), prompt_of),
                "unrelated": _prompt(partner(answered, host, same=False), prompt_of),
            }
            for name, donor in donors.items():
                if donor is not None:
                    names.append(name)
                    asks += [Ask(d, swap([k], DONOR, sweeper.phase), donor) for k in layers]
            names.append("noise")
            asks += [Ask(d, swap([k], NOISE, sweeper.phase), d.host) for k in layers]
        found = sweeper.judge(asks)
        for i, name in enumerate(names):
            rates[name].append([o.changed for o in found[i * depth : (i + 1) * depth]])
    by_layer = {
        name: [sum(row[k] for row in rows) / len(rows) for k in layers] if rows else []
        for name, rows in rates.items()
    }
    return by_layer, {name: len(rows) for name, rows in rates.items()}


def _prompt(side: Side | None, prompt_of: Callable[[Side], Prompt]) -> Prompt | None:
    return None if side is None else prompt_of(side)


def partner(answered: Sequence[AnsweredPair], host: Side, same: bool) -> Side | None:
    """Another pair's image with the same question and grid and the same (or another) answer under the host's
    `match`: the first, so that many hosts share one, or the first whose answer is the same to the letter.
    With another answer, the model's own output differs too."""
    question, grids, answer, own = _facts(answered, host)
    match = answered[host[0]].loaded.pair.match
    found: Side | None = None
    for side in ((i, s) for i in range(len(answered)) if i != host[0] for s in (0, 1)):
        *place, theirs, said = _facts(answered, side)
        if place != [question, grids]:
            continue
        if same and theirs == answer:
            return side
        alike = matches(theirs, answer, match), matches(answer, theirs, match)
        if found is None and (all(alike) if same else not any(alike) and said != own):
            found = side
    return found


def _facts(answered: Sequence[AnsweredPair], side: Side) -> tuple:
    """(question, grids, right answer, own output) of one image."""
    found, b = answered[side[0]], bool(side[1])
    p, said = found.loaded.pair, found.said_b if b else found.said_a
    return p.question, found.grids, p.answer_b if b else p.answer_a, said.tokens
