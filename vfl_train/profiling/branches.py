"""Which branches a profile runs on every prompt: the sweep in one list.

With swaps: the untouched base, every single layer, the two cumulative sweeps that bound the flip block (from
k on, up to k) and the cumulative drops of the drop curve, each layer set once. All of them share one prefix
a prompt, so the cumulative sets cost their triangles alone.
"""

from __future__ import annotations

from vfl_train.interventions import BASE, Branch, drop, swap
from vfl_train.profiling.sweep import DONOR

Key = tuple[str, range]  # the kind of intervention and its layers; base has none
NO_LAYERS = range(0)
BASE_KEY: Key = ("base", NO_LAYERS)


def single(k: int) -> range:
    """Layer k alone."""
    return range(k, k + 1)


def sweep_keys(intervention: str, depth: int) -> list[Key]:
    """What the sweep of a profile with this `intervention` asks of every direction, without repetitions."""
    layers = range(depth)
    if intervention == "drop":
        return [BASE_KEY, *(("drop", single(k)) for k in layers)]
    drops: list[Key] = [("drop", range(k, depth)) for k in layers]
    if intervention == "drop-from":
        return [BASE_KEY, *drops]
    swaps: list[Key] = [
        *(("swap", single(k)) for k in layers),
        *(("swap", range(k, depth)) for k in layers),
        *(("swap", range(k + 1)) for k in layers),
    ]
    return [BASE_KEY, *dict.fromkeys(swaps), *drops]


def branch_of(key: Key, phase: str) -> Branch:
    """The branch that `key` stands for; swaps read the donor named `DONOR`."""
    kind, layers = key
    if kind == "base":
        return BASE
    return swap(layers, DONOR, phase) if kind == "swap" else drop(layers, phase)


def first_layers(keys: list[Key]) -> list[int]:
    """The first layer each branch touches, where the engine lets it join; base runs from the bottom."""
    return [layers.start for _, layers in keys]
