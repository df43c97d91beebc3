"""Llama 4 Scout: experts in every second layer, chunked attention with RoPE and full attention without it;
tiles with separators between them and a thumbnail."""

from __future__ import annotations

import torch
from processors import byte_level_core
from tiny_models import LAYERS, TEXT, louder
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4ImageProcessor,
    Llama4Processor,
    PreTrainedTokenizerFast,
)

# Renders as the template of meta-llama/Llama-4-Scout-17B-16E-Instruct does without tools.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header_start|>' + message.role + '<|header_end|>\n\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for content in message.content %}{% if content.type == 'image' %}{{ '<|image|>' }}"
    "{% elif content.type == 'text' %}{{ content.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
SPECIAL = (
    "<|header_start|>", "<|header_end|>", "<|eot|>", "<|image_start|>", "<|image_end|>", "<|image|>",
    "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
)  # fmt: skip


def build(seed: int = 0) -> tuple[torch.nn.Module, Llama4Processor]:
    """Tiles of 32 x 32 pixels, at most four, 4 tokens each."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True),
        bos_token="<|begin_of_text|>", eos_token="<|eot|>", pad_token="<|finetune_right_pad|>",
        extra_special_tokens=list(SPECIAL),
    )  # fmt: skip
    images = Llama4ImageProcessor(size={"height": 32, "width": 32}, max_patches=4)
    processor = Llama4Processor(images, tokenizer, patch_size=8, chat_template=TEMPLATE)
    ids = tokenizer.convert_tokens_to_ids
    config = Llama4Config(
        text_config={
            **TEXT, "intermediate_size_mlp": 96, "head_dim": 16, "vocab_size": len(tokenizer),
            "num_local_experts": 2, "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "full_attention"] * (LAYERS // 2),
            "no_rope_layers": [1, 0] * (LAYERS // 2), "attention_chunk_size": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            # Released: 8192. Small enough for queries of a test to be scaled.
            "floor_scale": 16, "eos_token_id": ids("<|eot|>"), "bos_token_id": ids("<|begin_of_text|>"),
            "pad_token_id": ids("<|finetune_right_pad|>"),
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=ids("<|patch|>"), boi_token_index=ids("<|image_start|>"),
        eoi_token_index=ids("<|image_end|>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(Llama4ForConditionalGeneration(config)), processor
