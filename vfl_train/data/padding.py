"""Joining the inputs of samples into those of a batch."""

from __future__ import annotations

from typing import Any

import torch


def is_per_token(key: str, value: object, length: int) -> bool:
    """Whether an input of shape [1, T] or [1, T, ...] runs along the `length` tokens, not along pixels or
    images."""
    named = not key.startswith(("pixel", "image", "video"))
    return named and isinstance(value, torch.Tensor) and value.shape[:2] == (1, length)


def padded(values: list[torch.Tensor], length: int, fill: int) -> torch.Tensor:
    """[1, t, ...] tensors as one [B, length, ...]."""
    most = [max(sizes) for sizes in zip(*(value.shape[2:] for value in values), strict=True)]
    out = values[0].new_full((len(values), length, *most), fill)
    for index, value in enumerate(values):
        window = (slice(index, index + 1), *(slice(size) for size in value.shape[1:]))
        out[window] = value
    return out


def joined(values: list) -> Any:
    """Tensors joined along axis 0, padded with zeros in the others; lists joined."""
    if not all(isinstance(value, torch.Tensor) for value in values):
        return [item for value in values for item in value]
    if len({value.shape[1:] for value in values}) == 1:
        return torch.cat(values)
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    out = values[0].new_zeros((sum(value.shape[0] for value in values), *shape))
    at = 0
    for value in values:
        window = (slice(at, at + value.shape[0]), *(slice(size) for size in value.shape[1:]))
        out[window] = value
        at += value.shape[0]
    return out
