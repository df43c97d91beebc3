"""Tiny random models of families that have a recipe and no adapter of their own: LLaVA-OneVision, SmolVLM."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import templates
import torch
from processors import byte_level_core, qwen_tokenizer
from tiny_models import FAMILIES, TEXT, _louder
from transformers import (
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

# llava-hf/llava-onevision-qwen2-7b-ov-hf
LLAVA_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# HuggingFaceTB/SmolVLM-Instruct: Idefics3's with another first token.
SMOLVLM = templates.IDEFICS3.replace("<|begin_of_text|>", "<|im_start|>")
PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]


def llava_onevision(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Images in up to four tiles of 32 x 32 pixels and a thumbnail, 16 tokens each, and a newline a row."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = qwen_tokenizer(extra_special_tokens=special)
    size = {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS), tokenizer,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(
            **TEXT, vocab_size=len(tokenizer), eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("<|endoftext|>"), bos_token_id=None,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, vision_use_head=False,
        ),
        image_token_index=ids("<image>"), video_token_index=ids("<video>"), image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _louder(LlavaOnevisionForConditionalGeneration(config)), processor


def smolvlm(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Images above 32 x 32 pixels in tiles, each with a text token for its place, and a thumbnail."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<fake_token_around_image>", "<image>", "<global-img>", *places],
    )
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(**sizes), tokenizer, SmolVLMVideoProcessor(**sizes), image_seq_len=4,
        chat_template=SMOLVLM,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    config = SmolVLMConfig(
        text_config=LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), eos_token_id=ids("<end_of_utterance>"),
            pad_token_id=ids("<|im_end|>"), bos_token_id=ids("<|im_start|>"),
        ),
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        image_token_id=ids("<image>"), scale_factor=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _louder(SmolVLMForConditionalGeneration(config)), processor


@lru_cache
def saved(family: str, folder: Path) -> Path:
    """A tiny model of `family` with its processor, as transformers saves them, below `folder`."""
    model, processor = {**FAMILIES, "llava_onevision": llava_onevision, "smolvlm": smolvlm}[family]()
    model.save_pretrained(folder / family)
    processor.save_pretrained(folder / family)
    return folder / family
