"""SmolVLM: Idefics3 with another tokenizer, and videos."""

from __future__ import annotations

import templates
import torch
from tiny._idefics import SIZES, settings, tokenizer
from tiny_models import louder
from transformers import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

# HuggingFaceTB/SmolVLM-Instruct: Idefics3's with another first token.
TEMPLATE = templates.IDEFICS3.replace("<|begin_of_text|>", "<|im_start|>")


def build(seed: int = 0) -> tuple[torch.nn.Module, SmolVLMProcessor]:
    words = tokenizer("<|im_start|>", "<|im_end|>")
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(**SIZES), words, SmolVLMVideoProcessor(**SIZES), image_seq_len=4,
        chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(SmolVLMForConditionalGeneration(SmolVLMConfig(**settings(words)))), processor
