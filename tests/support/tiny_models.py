"""Tiny random models of real families with their real processors, built from configuration alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from processors import (
    gemma3_processor,
    internvl_processor,
    llava_processor,
    qwen2_processor,
    qwen3_processor,
    qwen_processor,
)
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import FAMILIES as REGISTERED
from vfl_train.models.families import family_of

LAYERS = 4
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def louder(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights at scale 0.02 let no intervention be felt; make every layer matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed_tokens" in name else 3.0)
    return model


def _qwen_ids(processor) -> tuple[dict, dict]:
    """Token ids for the text configuration and for the whole one."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer), "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"), "bos_token_id": None,
    }  # fmt: skip
    whole = {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip
    return text, whole


def _mrope(**changes: object) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **changes}


def qwen2_vl(seed: int = 0) -> tuple[torch.nn.Module, object]:
    processor = qwen2_processor()
    text, whole = _qwen_ids(processor)
    config = Qwen2VLConfig(
        text_config={**TEXT, **text, "rope_parameters": _mrope()},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        **whole,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(Qwen2VLForConditionalGeneration(config)), processor


def qwen2_5_vl(seed: int = 0) -> tuple[torch.nn.Module, object]:
    processor = qwen_processor()
    text, whole = _qwen_ids(processor)
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **text, "rope_parameters": _mrope()},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        **whole,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(Qwen2_5_VLForConditionalGeneration(config)), processor


def qwen3_vl(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Deepstack: visual features are added to the image's hidden states after the first two layers."""
    processor = qwen3_processor()
    text, whole = _qwen_ids(processor)
    config = Qwen3VLConfig(
        text_config={**TEXT, **text, "head_dim": 16, "rope_parameters": _mrope(mrope_interleaved=True)},
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        **whole,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(Qwen3VLForConditionalGeneration(config)), processor


def llava(seed: int = 0) -> tuple[torch.nn.Module, object]:
    processor = llava_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        text_config=LlamaConfig(
            **TEXT, vocab_size=len(processor.tokenizer), eos_token_id=ids("</s>"),
            pad_token_id=ids("<pad>"), bos_token_id=ids("<s>"),
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=32,
        ),
        image_token_id=ids("<image>"), vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(LlavaForConditionalGeneration(config)), processor


def internvl(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """InternVL3's decoder, Qwen2; images of up to four tiles and a thumbnail."""
    processor = internvl_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = InternVLConfig(
        text_config=Qwen2Config(
            **TEXT, vocab_size=len(processor.tokenizer), eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("<|endoftext|>"), bos_token_id=None,
        ),
        vision_config=InternVLVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8,
        ),
        image_token_id=ids("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return louder(InternVLForConditionalGeneration(config)), processor


def gemma3(seed: int = 0, window: int = 256) -> tuple[torch.nn.Module, object]:
    """Sliding-window and full layers in turn; `window` tokens are more than any test prompt has."""
    processor = gemma3_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            **TEXT, vocab_size=len(processor.tokenizer), head_dim=16, query_pre_attn_scalar=16,
            sliding_window=window, layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
            eos_token_id=ids("<eos>"), pad_token_id=ids("<pad>"), bos_token_id=ids("<bos>"),
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=8, vision_use_head=False,
        ),
        mm_tokens_per_image=16, image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.02)  # zero at birth
    model = louder(model)
    model.generation_config.eos_token_id = [ids("<eos>"), ids("<end_of_turn>")]  # as gemma-3-4b-it's
    return model, processor


def gemma3_short_window(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """Its sliding layers forget the image within a question."""
    return gemma3(seed, window=12)


FAMILIES = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava": llava,
    "internvl": internvl,
    "gemma3": gemma3,
}
VARIANTS = {"gemma3_short_window": gemma3_short_window}  # families in a form that needs care


def _builder(name: str) -> Callable[..., tuple[torch.nn.Module, object]]:
    """`build` of tests/support/tiny/NAME.py, imported when it is called."""
    return lambda seed=0: importlib.import_module(f"tiny.{name}").build(seed)


# Families with a file of their own: found by it, tried by the conformance suite (tests/models) alone.
MORE = {
    path.stem: _builder(path.stem)
    for path in sorted((Path(__file__).parent / "tiny").glob("*.py"))
    if not path.stem.startswith("_")
}
ALL = {**FAMILIES, **VARIANTS, **MORE}


def model_type_of(name: str) -> str:
    """The family of a tiny model: its own name, or that without what marks the variant."""
    known = (t for t in REGISTERED if name == t or name.startswith(f"{t}_"))
    return max(known, key=len, default=name)


# What the conformance suite tries; the others are refused in a sentence.
SUPPORTED = [name for name in ALL if family_of(model_type_of(name)).refused is None]


@cache
def tiny_vlm(family: str) -> VisionLanguageModel:
    """One tiny model a family or variant, float32 on the CPU. Shared: leave it as you found it."""
    model, processor = ALL[family]()
    return VisionLanguageModel(model, processor, f"tiny-{family}")


@cache
def saved(family: str, folder: Path) -> Path:
    """A tiny model of `family` with its processor, as transformers saves them, below `folder`."""
    model, processor = ALL[family]()
    model.save_pretrained(folder / family)
    processor.save_pretrained(folder / family)
    return folder / family
