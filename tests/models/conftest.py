"""Tiny models as folders that users have: weights, configuration and processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tiny_models import saved


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved folder of a family; each is made once."""
    return partial(saved, folder=tmp_path_factory.mktemp("models"))
