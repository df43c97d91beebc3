"""Putting encoded prompts and forced answers into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vfl_train.data.collator import joined

if TYPE_CHECKING:
    from vfl_train.interventions.readout import Prompt
    from vfl_train.models.vlm import VisionLanguageModel


def stack(
    vlm: VisionLanguageModel, sequences: Sequence[tuple[Prompt, Sequence[int]]], left: bool = False
) -> dict[str, torch.Tensor]:
    """Model inputs of (prompt, answer tokens) sequences: token-shaped tensors [B, T] padded on the right
    (or left), everything else (pixels, grids) joined along its first dimension."""
    width = max(prompt.length + len(tail) for prompt, tail in sequences)
    parts: dict[str, list[torch.Tensor]] = {}
    for prompt, tail in sequences:
        ids = prompt.inputs["input_ids"]
        start = width - prompt.length - len(tail) if left else 0
        middle = start + prompt.length
        for key, tensor in prompt.inputs.items():
            if tensor.shape == ids.shape:
                row = tensor.new_full((1, width), vlm.pad_token_id if key == "input_ids" else 0)
                row[:, start:middle] = tensor
                if key == "input_ids":
                    row[0, middle : middle + len(tail)] = torch.tensor(tail, dtype=row.dtype)
                elif key == "attention_mask":
                    row[0, middle : middle + len(tail)] = 1
                tensor = row
            parts.setdefault(key, []).append(tensor)
    batch = {key: joined(rows).to(vlm.device) for key, rows in parts.items()}
    return {k: v.to(vlm.model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
