"""Emu3 has no vision tower: a VQ-VAE writes each image as tokens of the vocabulary, row by row.

The VQ-VAE normalises over the whole picture, and transformers pads the pictures of a batch to the largest:
what an image is written as would depend on the images of other prompts. So each prompt is written by itself,
as transformers does it for a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vfl_train.models.families.family import Family


def tiles(processor: Any, size: tuple[int, int], images: int) -> tuple[int, int]:
    """(columns, rows) of the tokens of an image of `size` (width, height), ends of lines left out."""
    from transformers.models.emu3.image_processing_emu3 import smart_resize

    settings, (width, height) = processor.image_processor, size
    side = settings.spatial_factor
    rows, columns = smart_resize(height, width, side, settings.min_pixels, settings.max_pixels)
    return columns // side, rows // side


def written(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`inputs` of one prompt with the tokens of its images in place of placeholders and pixels."""
    rest = {key: value for key, value in inputs.items() if key not in ("pixel_values", "image_sizes")}
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].to(model.device, model.dtype)
        tokens = model.model.get_image_tokens(pixels, inputs["image_sizes"])
        ids = inputs["input_ids"].clone()
        ids[ids == model.config.image_token_id] = tokens.to(ids)
        rest["input_ids"] = ids
    return rest


EMU3 = Family(tiles=tiles, written=written)
