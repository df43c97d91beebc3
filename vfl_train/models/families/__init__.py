"""One small adapter per model family, only for what transformers does not say itself.

`FAMILIES` maps a model_type to its adapter; a family nobody registered gets `Family()`, the defaults that
hold for most of transformers, or is refused in one sentence where they do not.
"""

from __future__ import annotations

from vfl_train.models.families.family import Family
from vfl_train.models.families.internvl import INTERNVL
from vfl_train.models.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "internvl": INTERNVL,
    "llava": Family(),
    "gemma3": Family(),
}


def family_of(model_type: str) -> Family:
    """The adapter of `model_type`, or the defaults."""
    return FAMILIES.get(model_type, Family())
