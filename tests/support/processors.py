"""Processors of real families with tokenizers trained on the spot: no downloads."""

from __future__ import annotations

from typing import Any

import templates
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    Gemma3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

CORPUS = ["USER: ASSISTANT: what text is written here ? three cats, 12 dogs.\n system user assistant\n"] * 4
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # what sentencepiece falls back to


# --- tokenizers -------------------------------------------------------------------------------------


def byte_level_core(trim_offsets: bool) -> Tokenizer:
    """Byte-level BPE as in Qwen2 (trim_offsets False) or Llama 3 (True)."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


def metaspace_core() -> Tokenizer:
    """BPE over words with a visible space and single digits, as Llama 2's sentencepiece model."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def gemma_core() -> Tokenizer:
    """BPE with visible spaces and no prefix space, newlines in tokens of their own, as Gemma's."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens(["\n" * n for n in range(1, 6)])  # runs of newlines are in Gemma's vocabulary
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return core


def qwen_tokenizer(trim_offsets: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """Qwen2's tokenizer; `special` as PreTrainedTokenizerFast takes it."""
    special.setdefault("extra_special_tokens", list(QWEN_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        **special,
    )


# --- processors -------------------------------------------------------------------------------------


def qwen_processor(
    trim_offsets: bool = False,
    template: str | None = templates.QWEN,
    processor: type = Qwen2_5_VLProcessor,
    video: type = Qwen2VLVideoProcessor,
) -> Any:
    """Images of 32 x 32 to 64 x 64 pixels; 16 x 16 pixels a token."""
    geometry = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    return processor(
        image_processor=Qwen2VLImageProcessorPil(size=pixels, **geometry),
        tokenizer=qwen_tokenizer(trim_offsets),
        video_processor=video(size=pixels, **geometry),
        chat_template=template,
    )


def qwen2_processor() -> Qwen2VLProcessor:
    return qwen_processor(processor=Qwen2VLProcessor)


def qwen3_processor() -> Qwen3VLProcessor:
    return qwen_processor(template=templates.QWEN3, processor=Qwen3VLProcessor, video=Qwen3VLVideoProcessor)


def llava_processor() -> LlavaProcessor:
    """16 tokens an image, whatever its size."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=metaspace_core(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA,
    )


def internvl_processor() -> InternVLProcessor:
    """Tiles of 32 x 32 pixels, at most four and a thumbnail; 4 tokens a tile."""
    tokenizer = qwen_tokenizer(
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "chat_start_token": "<|im_start|>",
        },
    )
    size = {"height": 32, "width": 32}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=templates.INTERNVL,
    )


def gemma3_processor(**image_options: Any) -> Gemma3Processor:
    """16 tokens an image, whatever its size; `image_options` as the image processor takes them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=gemma_core(),
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "turn_start_token": "<start_of_turn>",
            "turn_end_token": "<end_of_turn>",
        },
    )
    size = {"height": 64, "width": 64}
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=size, **image_options),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=templates.GEMMA3,
    )
