"""Mistral Small 3.1: a Pixtral tower that keeps an image's shape, 16 x 16 pixels a token after merging, with
a break token behind each row."""

from __future__ import annotations

import torch
from processors import byte_level_core
from tiny_models import TEXT, louder
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

# mistralai/Mistral-Small-3.1-24B-Instruct-2503; its default system message is a page long and has the date.
TEMPLATE = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- if messages[0]['content'] is string %}{%- set system_message = messages[0]['content'] %}{%- else %}"
    "{%- set system_message = messages[0]['content'][0]['text'] %}{%- endif %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}"
    "{%- set system_message = 'You are Mistral Small 3.' %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}{%- for message in loop_messages %}"
    "{%- if message['role'] == 'user' %}{%- if message['content'] is string %}"
    "{{- '[INST]' + message['content'] + '[/INST]' }}{%- else %}{{- '[INST]' }}"
    "{%- for block in message['content'] %}{%- if block['type'] == 'text' %}{{- block['text'] }}"
    "{%- elif block['type'] == 'image' or block['type'] == 'image_url' %}{{- '[IMG]' }}{%- else %}"
    "{{- raise_exception('Only text and image blocks are supported in message content!') }}{%- endif %}"
    "{%- endfor %}{{- '[/INST]' }}{%- endif %}{%- elif message['role'] == 'assistant' %}"
    "{%- if message['content'] is string %}{{- message['content'] + eos_token }}{%- else %}"
    "{{- message['content'][0]['text'] + eos_token }}{%- endif %}{%- else %}"
    "{{- raise_exception('Only user, system and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
SPECIAL = (
    "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip


def build(seed: int = 0) -> tuple[torch.nn.Module, PixtralProcessor]:
    """Images of at most 64 x 64 pixels."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=list(SPECIAL),
    )  # fmt: skip
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    processor = PixtralProcessor(
        images, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=TEMPLATE
    )
    ids = tokenizer.convert_tokens_to_ids
    config = Mistral3Config(
        text_config=MistralConfig(
            **TEXT, vocab_size=len(tokenizer), head_dim=16, sliding_window=None, eos_token_id=ids("</s>"),
            pad_token_id=ids("<pad>"), bos_token_id=ids("<s>"),
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
            image_size=64, patch_size=8,
        ),
        image_token_index=ids("[IMG]"), spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = louder(Mistral3ForConditionalGeneration(config))
    model.model.multi_modal_projector.linear_2.weight.data.mul_(20)  # else words drown the image
    return model, processor
