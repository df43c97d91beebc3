"""Copies of tiny models in other precisions, for bounds that follow from rounding alone."""

from __future__ import annotations

import copy

import torch

from vfl_train.models import VisionLanguageModel


def with_float64_decoder(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """A copy whose decoder and head compute in float64. The vision tower stays as it is, so that the images
    are the same; transformers' RMS norms, which compute in float32 whatever they get, are replaced."""
    model = copy.deepcopy(vlm.model)
    decoder = model.get_decoder().double()
    model.get_output_embeddings().double()
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _Norm64(module)
    return VisionLanguageModel(model, vlm.processor, vlm.name_or_path)


class _Norm64:
    """RMS norm in the precision of its input; Gemma's weights are offsets from one."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.scale = norm.weight + ("Gemma" in type(norm).__name__)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale


def as_dtype(vlm: VisionLanguageModel, dtype: torch.dtype) -> VisionLanguageModel:
    """A copy in `dtype`."""
    return VisionLanguageModel(copy.deepcopy(vlm.model).to(dtype), vlm.processor, vlm.name_or_path)
