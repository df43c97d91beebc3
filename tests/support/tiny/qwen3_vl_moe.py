"""Qwen3-VL with a mixture of experts in every layer: two of four a token."""

from __future__ import annotations

import torch
from processors import qwen3_processor
from tiny_models import TEXT, _mrope, _qwen_ids, louder
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration


def build(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Deepstack: visual features are added to the image's hidden states after the first two layers."""
    processor = qwen3_processor()
    text, whole = _qwen_ids(processor)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = Qwen3VLMoeConfig(
        text_config={
            **TEXT, **text, **experts, "head_dim": 16, "rope_parameters": _mrope(mrope_interleaved=True),
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        **whole,
    )  # fmt: skip
    torch.manual_seed(seed + 1)  # of seed 0 the model says an image placeholder
    return louder(Qwen3VLMoeForConditionalGeneration(config)), processor
