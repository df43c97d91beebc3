"""What tells a loaded model's weights from another's."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from vfl_train.training.deepspeed import gathered

if TYPE_CHECKING:
    from vfl_train.models.vlm import VisionLanguageModel


def model_digest(vlm: VisionLanguageModel) -> str:
    """What tells this model's weights (an adapter's included) from another's without reading them all:
    sha256 over names, shapes and a sample of each tensor."""
    digest = hashlib.sha256(f"{vlm.model_type} {vlm.revision} {vlm.dtype}".encode())
    for name, tensor in sorted(vlm.model.state_dict(keep_vars=True).items()):
        with gathered([tensor]):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample)
    return digest.hexdigest()


def weights_digest(vlm: VisionLanguageModel) -> str:
    """sha256 over every byte of the weights, for what must not be taken for another model's even if that
    differs in a single row: 15 GB take seconds. LoRA that has been put on the model meanwhile does not
    count. Not for weights in slices (ZeRO-3)."""
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in vlm.model.state_dict().items()
        if ".lora_" not in name
    }
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for name, found in zip(weights, pool.map(_of_tensor, weights.values()), strict=True):
            digest.update(f"{name} {found}".encode())
    return digest.hexdigest()


def _of_tensor(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content.numpy().data).hexdigest()}"
