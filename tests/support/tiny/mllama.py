"""Llama 3.2 Vision: a Llama decoder in which some layers read the image by cross-attention, and no others."""

from __future__ import annotations

import torch
from processors import byte_level_core
from tiny_models import TEXT, louder
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

# Renders as the template of meta-llama/Llama-3.2-11B-Vision-Instruct does without tools: a system turn with
# dates comes by itself where there is no image.
TEMPLATE = (
    "{{ bos_token }}{% set seen = namespace(image=false, system=messages[0]['role'] == 'system') %}"
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.image = true %}{% endif %}{% endfor %}{% endfor %}"
    "{% if not seen.image and not seen.system %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = (
    "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", "<|image|>",
)  # fmt: skip
TILES = 4


def build(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Layers 1 and 3 of four read the image: up to four tiles of 32 x 32 pixels, 17 vision tokens each."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True), bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>", extra_special_tokens=list(SPECIAL),
    )  # fmt: skip
    images = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=TILES)
    processor = MllamaProcessor(images, tokenizer, chat_template=TEMPLATE)
    ids = tokenizer.convert_tokens_to_ids
    assert ids("<|image|>") == len(tokenizer) - 1  # beyond the head, as released: it cannot be said
    config = MllamaConfig(
        text_config={
            **TEXT, "vocab_size": len(tokenizer) - 1, "cross_attention_layers": [1, 3],
            "pad_token_id": ids("<|finetune_right_pad_id|>"), "bos_token_id": ids("<|begin_of_text|>"),
            "eos_token_id": [ids("<|end_of_text|>"), ids("<|eom_id|>"), ids("<|eot_id|>")],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 32, "patch_size": 8, "max_num_tiles": TILES,
            "intermediate_layers_indices": [0], "vision_output_dim": 64,
        },
        image_token_index=ids("<|image|>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = louder(MllamaForConditionalGeneration(config))
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            parameter.data.fill_(0.8)  # zero at birth, where the image is not read at all
    return model, processor
