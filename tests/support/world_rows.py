"""Rows about scenes of the phantom's world: a picture, a question, its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from vfl_train.phantom import world


def in_turn(count: int) -> list[str]:
    """`count` functions, all of the world's in turn."""
    return list(islice(cycle(world.FUNCTIONS), count))


def world_rows(
    folder: Path,
    functions: Sequence[str],
    seed: int = 0,
    answer: Callable[[world.Scene, str], str] = world.answer,
) -> list[dict[str, Any]]:
    """A row in messages form for each of `functions`, about a scene of its own; row i's picture is written to
    `folder` as i.png."""
    rng, rows = np.random.default_rng(seed), []
    for index, function in enumerate(functions):
        scene = world.sample_scene(rng)
        world.render(scene).save(folder / f"{index}.png")
        messages = [
            {"role": "user", "content": f"<image>{world.QUESTIONS[function]}"},
            {"role": "assistant", "content": answer(scene, function)},
        ]
        rows.append({"messages": messages, "images": [f"{index}.png"]})
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
