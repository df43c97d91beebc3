"""scripts/plant_interference.py as a module, and the phantom with its interfering layer."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from vfl_train.models import VisionLanguageModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "plant_interference.py"


@lru_cache(maxsize=1)
def script() -> ModuleType:
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("plant_interference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def planted_phantom() -> VisionLanguageModel:
    """The phantom with an interfering layer. Shared: leave it as you found it."""
    vlm = VisionLanguageModel.load("phantom", device="cpu")
    script().plant(vlm)
    return vlm
