"""Putting encoded prompts and forced answers into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vfl_train.data.padding import is_per_token, joined

if TYPE_CHECKING:
    from vfl_train.interventions.readout import Prompt
    from vfl_train.models.vlm import VisionLanguageModel


def alike(vlm: VisionLanguageModel, prompt: Prompt) -> int:
    """What prompts that share a batch must have in common for it to leave their numbers alone: by
    cross-attention, tokens before an image would read the pictures that pad other rows' number of images."""
    return len(prompt.spans) if vlm.family.cross_attention else 0


def stack(
    vlm: VisionLanguageModel, sequences: Sequence[tuple[Prompt, Sequence[int]]], left: bool = False
) -> dict[str, torch.Tensor]:
    """Model inputs of (prompt, answer tokens) sequences: token-shaped tensors [B, T] padded on the right
    (or left), everything else (pixels, grids) joined along its first dimension."""
    width = max(prompt.length + len(tail) for prompt, tail in sequences)
    inputs = {id(prompt): prompt.inputs for prompt, _ in sequences}
    if vlm.family.written is not None:
        inputs = {key: vlm.family.written(vlm.base, own) for key, own in inputs.items()}
    # Padding is of the answer's token type: what stands before it must not see it, whether masked or not.
    fills = {"input_ids": vlm.pad_token_id, "token_type_ids": vlm.encoder.answer_token_type}
    parts: dict[str, list[torch.Tensor]] = {}
    for prompt, tail in sequences:
        start = width - prompt.length - len(tail) if left else 0
        middle = start + prompt.length
        for key, tensor in inputs[id(prompt)].items():
            if is_per_token(key, tensor, prompt.length):
                row = tensor.new_full((1, width, *tensor.shape[2:]), fills.get(key, 0))
                row[:, start:middle] = tensor
                if key == "input_ids":
                    row[0, middle : middle + len(tail)] = torch.tensor(tail, dtype=row.dtype)
                elif key == "attention_mask":
                    row[0, middle : middle + len(tail)] = 1
                elif key == "cross_attention_mask":  # the answer sees the images that the last token sees
                    row[0, middle : middle + len(tail)] = tensor[0, -1]
                tensor = row
            parts.setdefault(key, []).append(tensor)
    batch = {key: joined(rows).to(vlm.device) for key, rows in parts.items()}
    return {k: v.to(vlm.model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
