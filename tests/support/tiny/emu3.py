"""Emu3: no vision tower; a VQ-VAE writes an image as tokens of the vocabulary, row by row, each closed by an
end-of-line token."""

from __future__ import annotations

import torch
from processors import byte_level_core
from tiny_models import TEXT, louder
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    PreTrainedTokenizerFast,
)

# BAAI/Emu3-Chat-hf: LLaVA-1.5's without the line break.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CODES = 64
VISUAL = [f"<|visual token {code:06d}|>" for code in range(CODES)]


def build(seed: int = 0) -> tuple[torch.nn.Module, Emu3Processor]:
    """Images of 32 x 32 to 64 x 64 pixels; 8 x 8 pixels a token, and one token a row."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True),
        bos_token="<|extra_203|>", eos_token="<|extra_204|>", pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
        },
    )  # fmt: skip
    tokenizer.add_tokens(["<|extra_200|>", *VISUAL], special_tokens=True)
    images = Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64)
    processor = Emu3Processor(images, tokenizer, chat_template=TEMPLATE)
    ids = tokenizer.convert_tokens_to_ids
    config = Emu3Config(
        text_config={
            **TEXT, "vocab_size": len(tokenizer), "attention_dropout": 0.0,
            "pad_token_id": ids("<|endoftext|>"), "bos_token_id": ids("<|extra_203|>"),
            "eos_token_id": ids("<|extra_204|>"),
        },
        vq_config={
            "codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1, "hidden_size": 32, "temporal_downsample_factor": 4,
        },
        vocabulary_map=tokenizer.get_vocab(),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = louder(Emu3ForConditionalGeneration(config))
    model.model.vqmodel.quantize.embedding.weight.data.normal_()  # else all codes are nearly one
    return model, processor
