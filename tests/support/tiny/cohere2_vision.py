"""Command A Vision: a Cohere2 decoder, tiles of 32 x 32 pixels with a line break behind each, at most four,
and the whole image; 4 tokens a tile. The turns are Aya Vision's (the released template has a preamble, tools
and documents around them)."""

from __future__ import annotations

import torch
from tiny._cohere import TEMPLATE, text_config, tokenizer
from tiny_models import louder
from transformers import (
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    SiglipVisionConfig,
)


def build(seed: int = 0) -> tuple[torch.nn.Module, Cohere2VisionProcessor]:
    words = tokenizer()
    images = Cohere2VisionImageProcessor(size={"height": 32, "width": 32}, max_patches=4, patch_size=2)
    processor = Cohere2VisionProcessor(
        images, words, chat_template=TEMPLATE.replace("<image>", "<|IMG_PATCH|>")
    )
    config = Cohere2VisionConfig(
        text_config=text_config(words),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, vision_use_head=False,
        ),
        image_token_id=words.convert_tokens_to_ids("<|IMG_PATCH|>"), downsample_factor=2,
        alignment_intermediate_size=64, tie_word_embeddings=False,  # random ones, tied, repeat one token
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(Cohere2VisionForConditionalGeneration(config)), processor
