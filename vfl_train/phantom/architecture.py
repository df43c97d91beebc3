"""The phantom's model and processor: an unmodified Qwen2.5-VL, small, built from configuration alone.

3 M parameters: a 12-layer decoder of width 128 and a 3-block vision tower of width 128 that turns a
64 x 64 image into 64 tokens. The tokenizer is word-level over the world's vocabulary with the real
special tokens, so AutoProcessor and AutoModelForImageTextToText load the saved folder like any other.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vfl_train.phantom import world

LAYERS, WIDTH = 12, 128
# Where training plants each function, in the papers' order of depth.
PLANTED = {"recognition": 1, "emotion": 3, "count": 5, "grounding": 7, "relation": 8, "ocr": 10}

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<|unk|>",
)  # fmt: skip
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|> ' + message['role'] + ' ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{{ '' if loop.first else ' ' }}"
    "{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ ' <|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|> assistant ' }}{%- endif -%}"
)


def build_processor() -> Qwen2_5_VLProcessor:
    """Processor of the phantom: word-level tokenizer, 8-pixel patches, no resizing of 64 x 64 images."""
    words = (*SPECIAL, *ROLES, *world.vocabulary())
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|unk|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
        model_max_length=4096,
    )
    geometry = {"patch_size": world.PATCH, "merge_size": 1, "temporal_patch_size": 1}
    pixels = {"shortest_edge": world.SIZE**2, "longest_edge": world.SIZE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=pixels, **geometry),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, **geometry),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, weights drawn from `seed`, float32."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": world.PATCH,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "out_hidden_size": WIDTH,
            "window_size": world.SIZE,
            "fullatt_block_indexes": [0, 1, 2],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config.vfl_world = "phantom"  # stays with every model made of this one; says which scenes it knows
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # The default 0.02 lets the first layer's attention drown which word a token is: questions about
    # words were then never learnt.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    model.generation_config = GenerationConfig(
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"), do_sample=False
    )
    return model
