"""Profiles and probe sets made up for reports, with everything a profile can hold."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from vfl_train.functions.probes import LoadedPair, ProbeSet
from vfl_train.schemas import FunctionProfile, ModelInfo, ProbePair, Profile


def measured(depth: int, peak: int = 2, block: tuple[int, ...] = (2, 3), text: str = "x") -> FunctionProfile:
    rates = [0.9 if k == peak else 0.1 for k in range(depth)]
    controls = {"self": 0.0, "nuisance": 0.05, "unrelated": 0.5}
    cost = {"rows": 1234, "reference_rows": 5, "plain_forwards": 9.25, "sweep_forwards": 2.5, "seconds": 61.5}
    return FunctionProfile(
        status="ok", pairs=50, pairs_answered=40, change_rate=rates, flip_rate=rates,
        ci95=[[max(0.0, r - 0.1), min(1.0, r + 0.05)] for r in rates],
        controls={k: [v] * depth for k, v in controls.items()} | {"noise": []},
        peak_layer=peak, layers=[peak], flip_block=list(block), distributed=len(block) > depth / 4,
        details={"all_layers": 0.98, "block": 0.93, "base_changed": 0.0, "cost": cost},
        examples=[{"pair": 1, "question": text, "answer_a": text, "answer_b": "B", "said": f"said {text}",
                   "said_swapped": f"swapped {text}"}],
    )  # fmt: skip


NOTHING = FunctionProfile("not_measurable", 50, 3, [], [], [], {}, None, [], [], False)


@pytest.fixture
def function_of():
    return measured


@pytest.fixture
def nothing():
    return NOTHING


@pytest.fixture
def profile_of():
    """Profile of the given functions, with nothing but the required keys and those in `more`."""

    def build(functions: dict[str, FunctionProfile], depth: int = 6, name: str = "m", **more: Any) -> Profile:
        return Profile(
            **{
                "model": ModelInfo(name, None, "qwen2_5_vl", depth, 64), "intervention": "swap",
                "phase": "text", "path": "reference", "dtype": "float32", "seed": 7, "versions": {},
                "probe_set": {"name": "builtin-1", "sha256": "0"}, "functions": functions, **more,
            }
        )  # fmt: skip

    return build


@pytest.fixture
def full_profile(profile_of):
    """A profile of `functions` measurable functions with every optional key; `text` wherever a text from
    outside can stand."""

    def build(functions: int = 2, depth: int = 6, text: str = "x", name: str = "m") -> Profile:
        names = ["ocr", "count", *(f"own_function_{i}" for i in range(functions - 2))][:functions]
        accuracy = [0.0] * 3 + [1.0] * (depth - 2)
        curve = {"accuracy": accuracy, "ci95": [[max(0.0, a - 0.1), a] for a in accuracy], "n": 80}
        blocks = {"own": 0.9, "other": 0.05, "both": 0.92, "pairs": 20}
        return profile_of(
            {n: measured(depth, peak=2 + i, block=(2 + i,), text=text) for i, n in enumerate(names)}, depth,
            name, path="engine", versions={"torch": text}, settings={"pairs": 50, "control_pairs": 20},
            drop_curve={n: curve for n in names},
            drop_plan={n: {"from_layer": 3, "points_lost": 0.5, "allowed_points": 1.0} for n in names},
            interaction={f: {g: blocks for g in names if g != f} for f in names},
            cost={"rows": 4321, "reference_rows": 5, "plain_forwards": 11.8, "seconds": 99.5,
                  "reasons": {text: 5}},
            compared_with={
                n: {"peak_layer": 1, "flip_block": [0, 1], "largest_change": 0.034} for n in names
            },
        )  # fmt: skip

    return build


@pytest.fixture
def probes_of():
    def build(*names: str, text: str = "what ?") -> ProbeSet:
        image = Image.new("RGB", (300, 200), "red")
        pairs = [LoadedPair(i + 1, ProbePair("f", "a", "b", text, text, "B"), image, image) for i in range(5)]
        return ProbeSet("p", "0", {n: pairs for n in names})

    return build
