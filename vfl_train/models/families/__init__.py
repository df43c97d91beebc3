"""One small adapter per model family, only for what transformers does not say itself.

`FAMILIES` maps a model_type to its adapter; a family nobody registered gets `Family()`, the defaults that
hold for most of transformers, or is refused in one sentence where they do not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a family departs from the default. `attention`, `mlp`: names inside a decoder layer.
    `linears`: module names inside a decoder layer that LoRA may adapt; `moe`: name suffixes that mark a
    layer's MLP as a mixture of experts (attention only is adapted then)."""

    attention: str = "self_attn"
    mlp: str = "mlp"
    linears: tuple[str, ...] = (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )  # fmt: skip
    moe: tuple[str, ...] = ("mlp.experts", "mlp.gate")


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(),
    "llava": Family(),
}


def family_of(model_type: str) -> Family:
    """The adapter of `model_type`, or the defaults."""
    return FAMILIES.get(model_type, Family())
