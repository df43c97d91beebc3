"""Greedy output under a branch, for answers judged by something looser than equality (a box by its overlap).

No cache: each step reads the next token of every unfinished row with what it has said so far. Equality needs
none of this (see `readout`): forcing the expected output tells whether it would have been generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vfl_train.interventions.readout import Row, read_out

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel


def generate_under(
    vlm: VisionLanguageModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    path: str = "reference",
    batch_tokens: int = 8192,
) -> list[tuple[int, ...]]:
    """The tokens each row's branch generates after its prompt, the end token included unless cut; the
    rows' own `answer` is ignored."""
    said: list[tuple[int, ...]] = [()] * len(rows)
    active = list(range(len(rows)))
    for _ in range(max_new_tokens):
        if not active:
            break
        step = [replace(rows[i], answer=said[i], targets=()) for i in active]
        for i, found in zip(active, read_out(vlm, step, path, batch_tokens), strict=True):
            said[i] = (*said[i], int(found.next_token or 0))
        active = [i for i in active if said[i][-1] not in vlm.eos_token_ids]
    return said
