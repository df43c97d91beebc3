"""Gemma 4 in the form of 31B: sliding windows and full layers in turn, full layers use their keys as values,
image tokens see each other both ways, the answer's header ends with an empty thought."""

from __future__ import annotations

from typing import Any

import torch
from processors import gemma_core
from tiny_models import LAYERS, TEXT, louder
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4VideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

# Render as the templates of google/gemma-4-E2B-it and google/gemma-4-31B-it do without tools and thinking.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}"
    "{% for item in message.content %}{% if item.type == 'text' %}{{ item.text | trim }}"
    "{% elif item.type == 'image' %}{{ '\n\n<|image|>\n\n' }}"
    "{% elif item.type == 'video' %}{{ '\n\n<|video|>\n\n' }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
THOUGHTLESS = TEMPLATE.replace("'<|turn>model\n' }}", "'<|turn>model\n<|channel>thought\n<channel|>' }}")
SPECIAL = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>", "sot_token": "<|turn>", "eot_token": "<turn|>",
    "soc_token": "<|channel>", "eoc_token": "<channel|>",
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=gemma_core(), unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>", extra_special_tokens=SPECIAL,
    )  # fmt: skip


def common(words: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the text configuration and of the whole one that all sizes share."""
    ids = words.convert_tokens_to_ids
    text = {
        **TEXT, "head_dim": 16, "global_head_dim": 32, "vocab_size": len(words), "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "final_logit_softcapping": 30.0, "eos_token_id": ids("<eos>"), "pad_token_id": ids("<pad>"),
        "bos_token_id": ids("<bos>"),
    }  # fmt: skip
    whole = {
        "image_token_id": ids("<|image|>"), "video_token_id": ids("<|video|>"),
        "audio_token_id": ids("<|audio|>"), "boi_token_id": ids("<|image>"),
        "eoi_token_id": ids("<image|>"), "boa_token_id": ids("<|audio>"), "eoa_token_index": ids("<audio|>"),
    }  # fmt: skip
    return text, whole


def gemma4(seed: int, template: str, **text: Any) -> tuple[torch.nn.Module, Gemma4Processor]:
    """A tiny model with the text settings `text` beside the common ones. At most 70 tokens an image, which is
    made as large as they allow: 32 x 32 pixels become 64 tokens."""
    words = tokenizer()
    geometry = {"max_soft_tokens": 70, "patch_size": 4}
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), Gemma4ImageProcessorPil(**geometry), words,
        Gemma4VideoProcessor(**geometry), chat_template=template, image_seq_length=70,
    )  # fmt: skip
    shared, whole = common(words)
    config = Gemma4Config(
        text_config={**shared, "vocab_size_per_layer_input": len(words), **text},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64,
        },
        audio_config=None, **whole,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = louder(Gemma4ForConditionalGeneration(config))
    # Embeddings are the head, too, and the last token would win; the image must be as loud as the text.
    model.get_input_embeddings().weight.data.div_(2)
    model.model.embed_vision.embedding_projection.weight.data.mul_(4)
    model.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("<turn|>")]
    return model, processor


def build(seed: int = 0) -> tuple[torch.nn.Module, Gemma4Processor]:
    return gemma4(
        seed, THOUGHTLESS, hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1,
        use_bidirectional_attention="vision",
    )  # fmt: skip
