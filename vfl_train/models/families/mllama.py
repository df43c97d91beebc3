"""Llama 3.2 Vision reads images by cross-attention in some decoder layers (8 of 40 in the 11B model) and
nowhere else; see `interventions.cross_attention` for what interventions mean there.

A text token reads the images of the last group before it: of images with text between them, only the last.
"""

from __future__ import annotations

from typing import Any

from vfl_train.models.families.family import Family


def vision_keys(config: Any) -> int:
    """Every image is padded to the most tiles; a tile has a class token beside its patches."""
    vision = config.vision_config
    return vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)


MLLAMA = Family(
    linears=(*Family().linears, *(f"cross_attn.{name}_proj" for name in "qkvo")),
    cross_attention="cross_attn",
    vision_keys=vision_keys,
    reference_only="the image is read by cross-attention",
)
