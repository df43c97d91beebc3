"""A tiny Qwen2.5-VL (the phantom's architecture, untrained), rows about its world, and one short run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from world_rows import in_turn, world_rows, write_jsonl

from vfl_train.config import LoraConfig


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in messages JSONL: a scene, a question, its answer."""
    folder = tmp_path_factory.mktemp("data")
    return write_jsonl(folder / "rows.jsonl", world_rows(folder, in_turn(24)))


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
