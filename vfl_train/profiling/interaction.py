"""Do the functions' blocks add up? What a swap at another function's block does, alone and together with the
function's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vfl_train.interventions import swap
from vfl_train.profiling.statistics import rate
from vfl_train.profiling.sweep import DONOR, AnsweredPair, Sweeper

INTERACTION_PAIRS = 20  # answered pairs a function that the table rests on

Table = dict[str, dict[str, dict[str, float]]]


def interaction(
    sweeper: Sweeper,
    answered: Mapping[str, Sequence[AnsweredPair]],
    blocks: Mapping[str, Iterable[int]],
) -> Table:
    """{f: {g: {"own", "other", "both", "pairs"}}} for the functions in `blocks` (f != g): the share of
    outputs on the first pairs of f that change under swaps at f's block, at g's, and at both."""
    sets = {name: frozenset(layers) for name, layers in blocks.items()}
    if len(sets) < 2:
        return {}
    return {f: _row(replace(sweeper, label=f), answered[f][:INTERACTION_PAIRS], f, sets) for f in sets}


def _row(
    sweeper: Sweeper, pairs: Sequence[AnsweredPair], f: str, sets: Mapping[str, frozenset[int]]
) -> dict[str, dict[str, float]]:
    wanted = {layers for g in sets for layers in (sets[g], sets[g] | sets[f])}
    unique = sorted(wanted, key=sorted)
    branches = [swap(layers, DONOR, sweeper.phase) for layers in unique]
    changed: list[list[bool]] = [[] for _ in unique]
    for chunk in sweeper.again(pairs):
        found = sweeper.outcomes([d for both in chunk for d in both], branches)
        for total, outcomes in zip(changed, found, strict=True):
            total += [o.changed for o in outcomes]
    rates = {layers: rate(c) for layers, c in zip(unique, changed, strict=True)}
    return {
        g: {
            "own": rates[sets[f]],
            "other": rates[sets[g]],
            "both": rates[sets[f] | sets[g]],
            "pairs": len(pairs),
        }
        for g in sets
        if g != f
    }
