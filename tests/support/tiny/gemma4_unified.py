"""Gemma 4 12B has no vision tower: patches of pixels go through one projection into a decoder like 31B's."""

from __future__ import annotations

import torch
from tiny.gemma4 import THOUGHTLESS, common, tokenizer
from tiny_models import louder
from transformers import (
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
)


def build(seed: int = 0) -> tuple[torch.nn.Module, Gemma4UnifiedProcessor]:
    words = tokenizer()
    geometry = {"max_soft_tokens": 70, "patch_size": 4}
    processor = Gemma4UnifiedProcessor(
        Gemma4UnifiedAudioFeatureExtractor(), Gemma4UnifiedImageProcessor(**geometry), words,
        Gemma4UnifiedVideoProcessor(**geometry), chat_template=THOUGHTLESS, image_seq_length=70,
    )  # fmt: skip
    text, whole = common(words)
    config = Gemma4UnifiedConfig(
        text_config={**text, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        vision_config={"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 70, "output_proj_dims": 64},
        audio_config=None, **whole,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = louder(Gemma4UnifiedForConditionalGeneration(config))
    model.get_input_embeddings().weight.data.div_(2)  # the head, too, in which the last token would win
    model.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("<turn|>")]
    return model, processor
