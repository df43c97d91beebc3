"""What Aya Vision and Command A Vision share: tokenizer, decoder, form of the chat."""

from __future__ import annotations

from processors import byte_level_core
from tiny_models import LAYERS, TEXT
from transformers import Cohere2Config, PreTrainedTokenizerFast

# CohereLabs/aya-vision-8b, without the preamble of the system turn (a page).
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>{{ message.role"
    " | replace('user', '<|USER_TOKEN|>') | replace('assistant', '<|CHATBOT_TOKEN|><|START_RESPONSE|>')"
    " | replace('system', '<|SYSTEM_TOKEN|>') }}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for item in message.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for item in message.content | selectattr('type', 'equalto', 'text') %}{{ item.text }}{% endfor %}"
    "{% endif %}{% if message.role == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)
TURNS = (
    "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip
IMAGE = {
    "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}  # fmt: skip


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """`more`: further special tokens."""
    found = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True), bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>", extra_special_tokens=IMAGE,
    )  # fmt: skip
    found.add_tokens([*TURNS, *more], special_tokens=True)
    return found


def text_config(tokenizer: PreTrainedTokenizerFast) -> Cohere2Config:
    """Three layers with a window, longer than any test prompt, to one without, as released."""
    return Cohere2Config(
        **TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, sliding_window=256,
        layer_types=["sliding_attention"] * (LAYERS - 1) + ["full_attention"], logit_scale=1.0,
    )  # fmt: skip
