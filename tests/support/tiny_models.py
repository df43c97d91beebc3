"""Tiny random models of real families with their real processors, built from configuration alone."""

from __future__ import annotations

from functools import lru_cache

import torch
from processors import llava_processor, qwen_processor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vfl_train.models import VisionLanguageModel

LAYERS = 4
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def _louder(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights at scale 0.02 let no intervention be felt; make every layer matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed_tokens" in name else 3.0)
    return model


def qwen2_5_vl(seed: int = 0) -> tuple[torch.nn.Module, object]:
    processor = qwen_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT, "vocab_size": len(processor.tokenizer), "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"), "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    return _louder(Qwen2_5_VLForConditionalGeneration(config)), processor


def llava(seed: int = 0) -> tuple[torch.nn.Module, object]:
    processor = llava_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        text_config=LlamaConfig(
            **TEXT, vocab_size=len(processor.tokenizer), eos_token_id=ids("</s>"),
            pad_token_id=ids("<pad>"), bos_token_id=ids("<s>"),
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=32,
        ),
        image_token_id=ids("<image>"), vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _louder(LlavaForConditionalGeneration(config)), processor


FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "llava": llava}


@lru_cache(maxsize=8)
def tiny_vlm(family: str) -> VisionLanguageModel:
    """One tiny model a family, float32 on the CPU. Shared: leave it as you found it."""
    model, processor = FAMILIES[family]()
    return VisionLanguageModel(model, processor, f"tiny-{family}")
