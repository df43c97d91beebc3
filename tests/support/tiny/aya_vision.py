"""Aya Vision: a Cohere2 decoder, tiles of 32 x 32 pixels with their number before each, at most four, and the
whole image; 4 tokens a tile."""

from __future__ import annotations

import torch
from tiny._cohere import TEMPLATE, text_config, tokenizer
from tiny_models import louder
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil


def build(seed: int = 0) -> tuple[torch.nn.Module, AyaVisionProcessor]:
    words = tokenizer("<image>", "TILE_GLOBAL", *(f"TILE_{n}" for n in range(1, 5)))
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    processor = AyaVisionProcessor(
        images, words, patch_size=8, img_size=32, downsample_factor=2, chat_template=TEMPLATE
    )
    config = AyaVisionConfig(
        text_config=text_config(words),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, vision_use_head=False,
        ),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"), downsample_factor=2,
        alignment_intermediate_size=64, tie_word_embeddings=False,  # random ones, tied, repeat one token
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(AyaVisionForConditionalGeneration(config)), processor
