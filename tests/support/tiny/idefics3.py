"""Idefics3: a Llama 3 decoder, images in tiles with text tokens between them."""

from __future__ import annotations

import templates
import torch
from tiny._idefics import SIZES, settings, tokenizer
from tiny_models import louder
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil


def build(seed: int = 0) -> tuple[torch.nn.Module, Idefics3Processor]:
    words = tokenizer("<|begin_of_text|>", "<|reserved_special_token_0|>")
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**SIZES), words, image_seq_len=4, chat_template=templates.IDEFICS3
    )
    torch.manual_seed(seed)
    return louder(Idefics3ForConditionalGeneration(Idefics3Config(**settings(words)))), processor
