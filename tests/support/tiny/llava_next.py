"""LLaVA-NeXT on Mistral 7B: images on the best of several canvases, in up to four tiles of 32 x 32 pixels
behind the whole image, 16 tokens each, padding cut off again, and a newline a row."""

from __future__ import annotations

import torch
from processors import metaspace_core
from tiny_models import TEXT, louder
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

# llava-hf/llava-v1.6-mistral-7b-hf: a generation prompt adds nothing.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def build(seed: int = 0) -> tuple[torch.nn.Module, LlavaNextProcessor]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=metaspace_core(), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=["<image>"],
    )  # fmt: skip
    tile = {"height": 32, "width": 32}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=tile, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = LlavaNextConfig(
        text_config=MistralConfig(
            **TEXT, vocab_size=len(tokenizer), sliding_window=None, eos_token_id=ids("</s>"),
            pad_token_id=ids("<pad>"), bos_token_id=ids("<s>"),
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=32,
        ),
        image_token_index=ids("<image>"), image_grid_pinpoints=PINPOINTS, image_seq_length=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(LlavaNextForConditionalGeneration(config)), processor
