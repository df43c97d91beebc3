"""What Idefics3 and SmolVLM share: images above 32 x 32 pixels in tiles, each with a text token for its
place, and a thumbnail; 4 tokens a tile."""

from __future__ import annotations

from typing import Any

from processors import byte_level_core
from tiny_models import TEXT
from transformers import LlamaConfig, PreTrainedTokenizerFast

SIZES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def tokenizer(bos: str, pad: str) -> PreTrainedTokenizerFast:
    """Llama 3's kind, with the families' image tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(trim_offsets=True), bos_token=bos, eos_token="<end_of_utterance>",
        pad_token=pad,
        extra_special_tokens=["<fake_token_around_image>", "<image>", "<global-img>", *PLACES],
    )  # fmt: skip


def settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Arguments of the model's configuration."""
    return {
        "text_config": LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        ),
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2,
    }  # fmt: skip
