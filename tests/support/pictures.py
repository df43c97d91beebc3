"""Images of random pixels."""

from __future__ import annotations

import torch
from PIL import Image


def picture(seed: int, size: int | tuple[int, int] = 32) -> Image.Image:
    """Noise of `size` (a side, or width and height)."""
    width, height = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
