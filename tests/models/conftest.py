"""Tiny models as folders that users have: weights, configuration and processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import FAMILIES


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved folder of a family; each is made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            model, processor = FAMILIES[family]()
            model.save_pretrained(made[family])
            processor.save_pretrained(made[family])
        return made[family]

    return folder
