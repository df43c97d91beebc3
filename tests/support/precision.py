"""Copies of tiny models in other precisions, for bounds that follow from rounding alone."""

from __future__ import annotations

import copy

import torch

from vfl_train.models import VisionLanguageModel


def with_float64_decoder(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """A copy whose decoder and head compute in float64. What comes before them stays as it is, so that text
    and images enter the same; transformers' norms, which compute in float32 whatever they get, are replaced.
    """
    model = copy.deepcopy(vlm.model)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products know no float64
    decoder = model.get_decoder().double()
    model.get_output_embeddings().double()
    for module in decoder.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or kind == "Cohere2LayerNorm":
            module.forward = _Norm64(module)
    embed = decoder.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, out: out.float())
    decoder.register_forward_pre_hook(_enter_in_float64, with_kwargs=True)
    return VisionLanguageModel(model, vlm.processor, vlm.name_or_path)


def _enter_in_float64(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    embedded = kwargs.get("inputs_embeds")
    if embedded is None:
        embedded = decoder.get_input_embeddings()(kwargs["input_ids"])
        kwargs = {**kwargs, "input_ids": None}
    if (images := kwargs.get("cross_attention_states")) is not None:
        kwargs = {**kwargs, "cross_attention_states": images.double()}
    masks = kwargs.get("attention_mask")
    if isinstance(masks, dict):
        kwargs = {**kwargs, "attention_mask": {kind: _wider(mask) for kind, mask in masks.items()}}
    elif masks is not None:
        kwargs = {**kwargs, "attention_mask": _wider(masks)}
    return args, {**kwargs, "inputs_embeds": embedded.double()}


def _wider(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bias of another type than the queries is read wrong, without an error, by torch's CPU kernels."""
    return mask.double() if mask is not None and mask.is_floating_point() else mask


class _Norm64:
    """RMS norm in the precision of its input; Gemma's weights are offsets from one, Cohere's is centred."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        offset = "Gemma" in type(norm).__name__ and "Gemma4" not in type(norm).__name__
        self.scale = getattr(norm, "weight", 1) + offset
        self.centred = "Cohere" in type(norm).__name__

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale


def as_dtype(vlm: VisionLanguageModel, dtype: torch.dtype) -> VisionLanguageModel:
    """A copy in `dtype`."""
    return VisionLanguageModel(copy.deepcopy(vlm.model).to(dtype), vlm.processor, vlm.name_or_path)
