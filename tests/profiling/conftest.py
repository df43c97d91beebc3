"""The phantom, loaded once, and probe pairs of it."""

from __future__ import annotations

import pytest

from vfl_train.models import VisionLanguageModel


@pytest.fixture(scope="session")
def phantom() -> VisionLanguageModel:
    return VisionLanguageModel.load("phantom", device="cpu")
