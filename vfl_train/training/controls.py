"""Control layer sets: what VFL-LoRA must be compared with, at equal size wherever that is defined."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vfl_train.errors import ConfigError

CONTROLS = ("all", "random", "reversed")


def apply_control(layers: Sequence[int], num_layers: int, control: str, seed: int) -> tuple[int, ...]:
    """The control set of `layers`, sorted.

    - `all`: every decoder layer (ordinary LoRA; the only control of another size).
    - `random`: as many layers, drawn by `seed` from those outside the plan.
    - `reversed`: as many layers outside the plan, the farthest from it first (of equally far ones the
      deeper). With half of the layers planned this is the papers' "reversed" set, the other half.

    Raises:
        ConfigError: unknown control, or fewer layers outside the plan than in it.
    """
    if control not in CONTROLS:
        raise ConfigError(f"--control {control!r} is unknown", f"use one of {', '.join(CONTROLS)}")
    if control == "all":
        return tuple(range(num_layers))
    outside = [layer for layer in range(num_layers) if layer not in set(layers)]
    if len(outside) < len(layers):
        raise ConfigError(
            f"--control {control} is not defined: {len(layers)} of {num_layers} layers are planned, "
            f"only {len(outside)} are left",
            "use --control all, or plan fewer layers",
        )
    if control == "random":
        return tuple(sorted(random.Random(seed).sample(outside, len(layers))))
    outside.sort(key=lambda layer: (-min(abs(layer - planned) for planned in layers), -layer))
    return tuple(sorted(outside[: len(layers)]))
