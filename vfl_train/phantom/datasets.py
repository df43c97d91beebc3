"""What the demo and the tests draw from the world: an unlabelled pool of training rows and probe sets, in the
file formats that users bring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vfl_train.functions.probes import LoadedPair, ProbeSet
from vfl_train.phantom import world
from vfl_train.schemas import LANGUAGE, ProbePair

# Shares of the demo's pool. `ocr_handwritten` and `count_handwritten` are the shifted domain.
POOL = {
    "recognition": 0.13, "emotion": 0.13, "count": 0.13, "grounding": 0.13, "relation": 0.13, LANGUAGE: 0.10,
    "count_handwritten": 0.05, "ocr": 0.08, "ocr_handwritten": 0.12,
}  # fmt: skip


def function_of(kind: str) -> str:
    """The function that a kind of row asks for."""
    return kind.removesuffix("_handwritten")


def _scene(kind: str, rng: np.random.Generator, split: str) -> world.Scene:
    return world.sample_scene(rng, "digits" if kind.endswith("_handwritten") else "fonts", split)


def write_pool(folder: Path, rows: int, seed: int, shares: Mapping[str, float] = POOL) -> Path:
    """Write `rows` single-turn rows, mixed and shuffled, as LLaVA JSON with PNG images; returns the file.

    What each row asks for stands only in truth.json beside it, which no command reads.
    """
    rng = np.random.default_rng([seed, 2_000_000])
    kinds = [k for k, share in shares.items() for _ in range(round(share * rows))]
    rng.shuffle(kinds)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries, truth = [], {}
    for i, kind in enumerate(kinds):
        entry: dict[str, object] = {"id": f"row-{i:05d}"}
        if kind == LANGUAGE:
            question, reply = world.LANGUAGE[int(rng.integers(len(world.LANGUAGE)))]
        else:
            scene, function = _scene(kind, rng, "train"), function_of(kind)
            question, reply = world.QUESTIONS[function], world.answer(scene, function)
            entry["image"] = f"images/{i:05d}.png"
            world.render(scene).save(folder / str(entry["image"]), compress_level=1)
            question = f"<image>\n{question}"
        entry["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
        entries.append(entry)
        truth[str(entry["id"])] = kind
    (folder / "truth.json").write_text(json.dumps(truth, indent=0) + "\n", encoding="utf-8")
    path = folder / "pool.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
    return path


def probe_set(kinds: Mapping[str, int], seed: int) -> ProbeSet:
    """Minimal pairs of every kind (`ocr_handwritten` is a function of its own here), unseen scenes and
    handwritten specimens; `kinds` maps a kind to its number of pairs."""
    pairs: dict[str, list[LoadedPair]] = {}
    digest = hashlib.sha256()
    for kind, count in kinds.items():
        function = function_of(kind)
        source = "digits" if kind.endswith("_handwritten") else "fonts"
        for i, (a, b) in enumerate(world.minimal_pairs(function, count, 1_000_000 + seed, source, "test")):
            replies = world.answer(a, function), world.answer(b, function)
            name = f"{kind}-{i:03d}"
            pair = ProbePair(kind, f"{name}-a.png", f"{name}-b.png", world.QUESTIONS[function], *replies)
            loaded = LoadedPair(i + 1, pair, world.render(a), world.render(b))
            digest.update(loaded.image_a.tobytes() + loaded.image_b.tobytes())
            pairs.setdefault(kind, []).append(loaded)
    return ProbeSet("phantom", digest.hexdigest(), pairs)
