"""A tiny Qwen2.5-VL (the phantom's architecture, untrained), rows about its world, and one short run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfl_train.config import LoraConfig
from vfl_train.phantom import world


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in messages JSONL: a scene, a question, its answer."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for index in range(24):
        scene = world.sample_scene(rng)
        Image.fromarray(world.draw(scene)).save(folder / f"{index}.png")
        function = world.FUNCTIONS[index % len(world.FUNCTIONS)]
        messages = [
            {"role": "user", "content": f"<image>{world.QUESTIONS[function]}"},
            {"role": "assistant", "content": world.answer(scene, function)},
        ]
        lines.append(json.dumps({"messages": messages, "images": [f"{index}.png"]}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_config(base_folder: Path, data_file: Path) -> Callable[..., LoraConfig]:
    """LoraConfig of a two-step run on the CPU; keywords replace settings."""

    def make(output: Path, **changes: object) -> LoraConfig:
        settings = {
            "model": str(base_folder), "data": str(data_file), "output": output, "device": "cpu",
            "layers": "7-8,10", "max_steps": 2, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "logging_steps": 1,
        }  # fmt: skip
        return LoraConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def trained(make_config: Callable[..., LoraConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter folder of one short run."""
    from vfl_train.training.run import train_lora

    return train_lora(make_config(tmp_path_factory.mktemp("run") / "adapter"))
