"""One small adapter per model family, only for what transformers does not say itself.

`FAMILIES` maps a model_type to its adapter; a family nobody registered gets `Family()`, the defaults that
hold for most of transformers, or is refused in one sentence where they do not.
"""

from __future__ import annotations

from typing import Any

from vfl_train.errors import ConfigError
from vfl_train.models.families.anyres import LLAVA_NEXT, LLAVA_ONEVISION
from vfl_train.models.families.cohere import AYA_VISION, COHERE2_VISION
from vfl_train.models.families.deepseek_vl import DEEPSEEK_VL_HYBRID
from vfl_train.models.families.emu3 import EMU3
from vfl_train.models.families.family import Family
from vfl_train.models.families.gemma4 import GEMMA4
from vfl_train.models.families.glm4v import GLM4V
from vfl_train.models.families.internvl import INTERNVL
from vfl_train.models.families.llama4 import LLAMA4
from vfl_train.models.families.mllama import MLLAMA
from vfl_train.models.families.paligemma import PALIGEMMA
from vfl_train.models.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from vfl_train.models.families.refused import REFUSED

__all__ = ["FAMILIES", "Family", "family_of", "prepare", "supported_family"]

FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL,
    "glm4v": GLM4V,
    "deepseek_vl_hybrid": DEEPSEEK_VL_HYBRID,
    "paligemma": PALIGEMMA,
    "mllama": MLLAMA,
    "internvl": INTERNVL,
    "llava": Family(),
    "gemma3": Family(),
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "idefics3": Family(),  # tiles have text tokens between them, which say how they are laid out
    "smolvlm": Family(),
    "mistral3": Family(),
    "aya_vision": AYA_VISION,
    "cohere2_vision": COHERE2_VISION,
    "emu3": EMU3,
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4,
    "llama4": LLAMA4,
    **REFUSED,
}


def family_of(model_type: str) -> Family:
    """The adapter of `model_type`, or the defaults."""
    return FAMILIES.get(model_type, Family())


def supported_family(model_type: str) -> Family:
    """As `family_of`. Raises ConfigError with the family's own sentence where it is refused."""
    family = family_of(model_type)
    if family.refused is not None:
        raise ConfigError(f"{model_type} models are not supported: {family.refused}")
    return family


def prepare(processor: Any, model_type: str) -> None:
    """Do to `processor` what the family asks for before it is used. Doing it again changes nothing."""
    family = family_of(model_type)
    if family.prepare is not None:
        family.prepare(processor)
