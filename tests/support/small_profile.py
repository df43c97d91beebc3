"""A profile of three layers and one function, as JSON."""

from __future__ import annotations

from typing import Any

RATES = [0.1, 0.9, 0.1]
VALUE: dict[str, Any] = {
    "schema_version": 1,
    "model": {"name_or_path": "some/model", "revision": None, "model_type": "qwen2_5_vl", "num_layers": 3,
              "hidden_size": 16},
    "intervention": "swap", "phase": "text", "path": "engine", "dtype": "float32", "seed": 0, "versions": {},
    "probe_set": {"name": "builtin", "sha256": "0"},
    "functions": {
        "ocr": {"status": "ok", "pairs": 20, "pairs_answered": 20, "change_rate": RATES, "flip_rate": RATES,
                "ci95": [[0.0, 1.0]] * 3, "controls": {"self": [0.0] * 3, "nuisance": []}, "peak_layer": 1,
                "layers": [1], "flip_block": [1, 2], "distributed": False},
    },
    "drop_curve": {}, "drop_plan": {},
}  # fmt: skip
