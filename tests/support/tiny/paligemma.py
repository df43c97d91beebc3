"""PaliGemma: a Gemma decoder whose prompt, image and question, is one bidirectional prefix."""

from __future__ import annotations

import torch
from processors import gemma_core
from tiny_models import TEXT, louder
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


def build(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """16 tokens an image, whatever its size. The processor has no chat template, as the released one."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=gemma_core(), unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>",
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    config = PaliGemmaConfig(
        text_config=GemmaConfig(
            **TEXT, vocab_size=len(tokenizer), head_dim=16, eos_token_id=ids("<eos>"),
            pad_token_id=ids("<pad>"), bos_token_id=ids("<bos>"),
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, vision_use_head=False, projection_dim=64,
        ),
        projection_dim=64, image_token_index=ids("<image>"),
        tie_word_embeddings=False,  # tied ones at this size say the last token again and again
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(PaliGemmaForConditionalGeneration(config)), processor
