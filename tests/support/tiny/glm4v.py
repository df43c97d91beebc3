"""GLM-4.1V: Qwen2-VL's image geometry, RoPE on half of each head, one matrix for gate and up projections."""

from __future__ import annotations

import torch
from processors import byte_level_core
from tiny_models import TEXT, louder
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

# Renders as the template of zai-org/GLM-4.1V-9B-Thinking: turns are opened by a token and not closed, and of
# a system turn and an answer the content is written as it is (a list of parts would be printed).
TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'user' and m.content is not string %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif part.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>",
    "<|video|>",
)  # fmt: skip


def build(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Images of 32 x 32 to 64 x 64 pixels; 16 x 16 pixels a token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=False),
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL),
    )  # fmt: skip
    geometry = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    # Counted over the two frames that an image is taken for.
    size = {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 64 * 64}
    processor = Glm4vProcessor(
        Glm4vImageProcessorPil(size=size, **geometry), tokenizer,
        Glm4vVideoProcessor(size=size, **geometry), chat_template=TEMPLATE,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }  # fmt: skip
    config = Glm4vConfig(
        text_config={
            **TEXT, "vocab_size": len(tokenizer), "pad_token_id": ids("<|endoftext|>"),
            "eos_token_id": [ids("<|endoftext|>"), ids("<|user|>")], "rope_parameters": rope,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "image_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
        },
        image_token_id=ids("<|image|>"), video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"), image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"), video_end_token_id=ids("<|end_of_video|>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(Glm4vForConditionalGeneration(config)), processor
