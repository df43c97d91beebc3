"""DeepSeek-VL 7B: every image through two encoders, SigLIP at low and SAM at high resolution."""

from __future__ import annotations

import torch
from processors import byte_level_core
from tiny_models import TEXT, louder
from tokenizers import processors
from transformers import (
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SamVisionConfig,
    SiglipVisionConfig,
)
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Renders as the template of deepseek-community/deepseek-vl-7b-chat, for turns of at most one text after
# their images: an answer is closed by the end token where another turn follows, and only there.
TEMPLATE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.\n\n"
    "{% for m in messages %}{{ m['role'] | capitalize + ':' }}"
    "{% if m['role'] != 'assistant' or not loop.last or add_generation_prompt "
    "or m['content'][0]['text'] %}{{ ' ' }}{% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image_placeholder>"
    "{% elif loop.first %}{{ part['text'] | trim }}{% else %}{{ part['text'].rstrip() }}{% endif %}"
    "{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}"
    "{{ '\n\n' if m['role'] == 'user' else '" + EOS + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """16 tokens an image, whatever its size."""
    core = byte_level_core(trim_offsets=False)
    core.add_special_tokens([BOS, EOS])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=EOS,
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )  # fmt: skip
    images = DeepseekVLHybridImageProcessorPil(
        size={"height": 32, "width": 32}, high_res_size={"height": 64, "width": 64}
    )
    processor = DeepseekVLHybridProcessor(images, tokenizer, chat_template=TEMPLATE, num_image_tokens=16)
    ids = tokenizer.convert_tokens_to_ids
    config = DeepseekVLHybridConfig(
        text_config=LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), eos_token_id=ids(EOS), pad_token_id=ids(EOS),
            bos_token_id=ids(BOS),
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, vision_use_head=False,
        ),
        high_res_vision_config=SamVisionConfig(
            hidden_size=32, mlp_dim=48, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=8, output_channels=16, window_size=4, global_attn_indexes=[1],
        ),
        image_token_id=ids("<image_placeholder>"), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = DeepseekVLHybridForConditionalGeneration(config)
    model.model.high_res_vision_alpha.data.fill_(0.5)  # zero at birth
    return louder(model), processor
