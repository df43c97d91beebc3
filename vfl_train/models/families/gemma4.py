"""Gemma 4. An image keeps its aspect and is one run of placeholders, which does not tell 5 x 11 from 11 x 5.

Its sizes differ in what the engine can share. 31B, 26B-A4B and 12B (`gemma4_unified`: no vision tower, pixels
go through one projection) run there. E2B and E4B give every layer an embedding of the token itself, and their
upper layers read keys and values of lower ones: they run on the reference path, where an intervention on such
a layer changes what that layer alone reads.

It writes boxes as [y, x, y, x] in a grid of 1000, an order that no probe asks for.
"""

from __future__ import annotations

from typing import Any

from vfl_train.models.families.family import Family


def tiles(processor: Any, size: tuple[int, int], images: int) -> tuple[int, int]:
    """(columns, rows) of the tokens of an image of `size` (width, height)."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    settings, (width, height) = processor.image_processor, size
    pooled = settings.pooling_kernel_size
    most = settings.max_soft_tokens * pooled**2
    rows, columns = get_aspect_ratio_preserving_size(height, width, settings.patch_size, most, pooled)
    side = settings.patch_size * pooled
    return columns // side, rows // side


GEMMA4 = Family(tiles=tiles, moe=("experts", "router"), connectors=("model.embed_vision",))
