"""InternVL in transformers' own form (checkpoints named -hf). An image is one run of placeholders, 256 a
tile, that tells how many tiles there are but not how they are laid out: 1 x 2 and 2 x 1 look the same.

Source of the boxes: InternVL 1.5 and later, chat data format (coordinates normalised to [0, 1000)).
"""

from __future__ import annotations

from typing import Any

from vfl_train.models.families.family import Family


def tiles(processor: Any, size: tuple[int, int], images: int = 1) -> tuple[int, int]:
    """(columns, rows) of the tiles that an image of `size` (width, height) is cut into."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    settings, (width, height) = processor.image_processor, size
    # The processor's own setting wins over the image processor's, as in its call.
    crop = processor.images_kwargs.get("crop_to_patches", settings.crop_to_patches)
    if not crop or settings.max_patches <= 1:
        return 1, 1
    tile = (settings.size["height"], settings.size["width"])
    return get_optimal_tiled_canvas((height, width), tile, settings.min_patches, settings.max_patches)


INTERNVL = Family(tiles=tiles, box="relative-1000", video=True)
