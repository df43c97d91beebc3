"""LLaVA-NeXT and LLaVA-OneVision put an image on the best of several canvases, cut that into tiles, glue the
tiles' features together again and cut off what was padding: the rows and columns that are left do not follow
from the number of tokens (4 rows of 5 and 3 rows of 7 with a newline each are both 24). Of several images in
a prompt LLaVA-OneVision cuts none.

Sources: LLaVA-NeXT, llava-vl.github.io/blog/2024-01-30-llava-next; LLaVA-OneVision, arXiv 2408.03326, 3.2.
"""

from __future__ import annotations

from typing import Any

from vfl_train.models.families.family import Family


def layout(processor: Any, size: tuple[int, int], images: int = 1) -> tuple[int, int]:
    """(columns, rows) of the features of an image of `size` (width, height) that stand behind those of the
    whole image."""
    from transformers.image_processing_utils import select_best_resolution

    images_processor, (width, height) = processor.image_processor, size
    canvas = select_best_resolution([height, width], images_processor.image_grid_pinpoints)
    tile = images_processor.crop_size or images_processor.size
    scale = canvas[0] // tile["height"], canvas[1] // tile["width"]
    tokens, rows = processor._get_unpadded_features(height, width, *_patches(processor, tile), *scale)
    return tokens // rows, rows


def uncut_among_others(processor: Any, size: tuple[int, int], images: int = 1) -> tuple[int, int]:
    """As `layout`; (1, 1) of one of several images."""
    return layout(processor, size) if images == 1 else (1, 1)


def _patches(processor: Any, tile: Any) -> tuple[int, int]:
    """Rows and columns of a tile's features."""
    if hasattr(processor, "num_image_tokens"):
        side = round(processor.num_image_tokens**0.5)
        return side, side
    return tile["height"] // processor.patch_size, tile["width"] // processor.patch_size


LLAVA_NEXT = Family(tiles=layout)
LLAVA_ONEVISION = Family(tiles=uncut_among_others)
