"""Weights in 4 or 8 bits while loading, by bitsandbytes.

Quantized are the linear layers of the decoder's layers, nothing else. Vision tower and connector stay in 16
bits: they are a few per cent of the weights, and what they lose every function reads (Unsloth's dynamic 4-bit
models leave them out for that; plain transformers and LLaMA-Factory quantize them). So does the output head,
as everywhere. 4 bits are QLoRA's: NF4 with quantized scales, computed with in the model's own dtype
(Dettmers et al. 2023, https://huggingface.co/papers/2305.14314).

An adapter that is trained on quantized weights names the 16-bit model as its base, and is merged into that.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vfl_train.errors import ConfigError


def bits_of(load_in_4bit: bool, load_in_8bit: bool) -> int | None:
    """4, 8, or None. Raises ConfigError for both, or without bitsandbytes."""
    if not (load_in_4bit or load_in_8bit):
        return None
    bits = 4 if load_in_4bit else 8
    if load_in_4bit and load_in_8bit:
        raise ConfigError("--load-in-4bit and --load-in-8bit exclude each other", "give one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--load-in-{bits}bit needs the package bitsandbytes", "pip install 'vfl-train[quant]'"
        )
    return bits


def quantization(folder: Path, bits: int, dtype: torch.dtype) -> Any:
    """transformers' `quantization_config` for the model in `folder`. Raises ConfigError."""
    from transformers import BitsAndBytesConfig

    # One expression: transformers skips a module whose name matches from the start, and this matches
    # every name that does not begin with that of the decoder's layers.
    skipped = [rf"(?!{re.escape(_decoder_layers(folder))}\.).*"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _decoder_layers(folder: Path) -> str:
    """Full name of the decoder's layer list, from the model's structure (no weights are read)."""
    from vfl_train.models.vlm import find_layers

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"{folder} holds quantized weights already", "leave --load-in-4bit and -8bit out"
            )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"cannot read the configuration in {folder}: {str(e).splitlines()[0]}") from e
    depth = int(config.get_text_config(decoder=True).num_hidden_layers)
    return find_layers(model, depth)[0]
