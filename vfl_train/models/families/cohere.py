"""Aya Vision and Command A Vision (Cohere2 decoder: attention and MLP side by side, most layers with a
sliding window): the tiles of an image tell how many they are but not how they are laid out.

Command A Vision's own image processor chooses among the same canvases as InternVL's, in another way; Aya
Vision has InternVL's.
"""

from __future__ import annotations

from typing import Any

from vfl_train.models.families.family import Family
from vfl_train.models.families.internvl import tiles


def command_tiles(processor: Any, size: tuple[int, int], images: int = 1) -> tuple[int, int]:
    """(columns, rows) of the tiles that Command A Vision cuts an image of `size` (width, height) into."""
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import get_optimal_tiled_canvas

    found, (width, height) = processor.image_processor, size
    if not found.crop_to_patches:
        return 1, 1
    tile = (found.size["height"], found.size["width"])
    return get_optimal_tiled_canvas((height, width), tile, found.min_patches, found.max_patches)


AYA_VISION = Family(tiles=tiles)
COHERE2_VISION = Family(tiles=command_tiles)
