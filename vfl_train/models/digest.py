"""What tells a loaded model's weights from another's."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfl_train.models.vlm import VisionLanguageModel


def model_digest(vlm: VisionLanguageModel) -> str:
    """What tells this model's weights (an adapter's included) from another's without reading them all:
    sha256 over names, shapes and a sample of each tensor."""
    digest = hashlib.sha256(f"{vlm.model_type} {vlm.revision} {vlm.dtype}".encode())
    for name, tensor in sorted(vlm.model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample)
    return digest.hexdigest()
