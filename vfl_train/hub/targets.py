"""What PEFT, vLLM, SGLang and llama.cpp load, and adapters made to fit them.

Sources (read 2026-11; the rules are imitated in tests/hub/test_targets.py):
- vLLM: vllm/lora/peft_helper.py `PEFTHelper._validate_features`, `validate_legal`; vllm/lora/lora_model.py
  `check_unexpected_modules` (at 0306474); vllm/config/lora.py `MaxLoRARanks`. Versions up to 0.30 ignore
  rank_pattern and alpha_pattern without a word (vllm-project/vllm#59799).
- SGLang: python/sglang/srt/lora/lora_manager.py `validate_new_adapter`, `init_lora_shapes`; lora/utils.py
  `get_normalized_target_modules` (at 01235a1); models/qwen2_vl.py `should_apply_lora`.
- llama.cpp: conversion/__init__.py `TEXT_MODEL_MAP`, `MMPROJ_MODEL_MAP` (at 00bdaa1), conversion/base.py
  `get_model_architecture`. Its image tools know no LoRA (ggml-org/llama.cpp#14867): merged models only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError
from vfl_train.hub.keys import lora_shapes
from vfl_train.hub.load import PEFT_PREFIX, PLAIN_INITS, WEIGHTS, AdapterInfo

if TYPE_CHECKING:
    import torch

PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
HERE = "THIS_FOLDER"  # stands in commands and snippets for a folder that belongs to no repo
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# SGLang: the last part of a module's name -> the name under which it keeps the weights.
SGLANG_MODULES = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "o_proj": "o_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
}  # fmt: skip
_MMPROJ = {
    "Gemma3ForConditionalGeneration", "Gemma3nForConditionalGeneration", "Gemma4ForConditionalGeneration",
    "Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration", "SmolVLMForConditionalGeneration",
}  # fmt: skip
_TEXT = (_MMPROJ - {"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"}) | {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "VLlama3ForCausalLM",
    "Gemma3ForCausalLM", "Gemma3TextModel",
}  # fmt: skip
_UNSERVED = (
    "modules_to_save", "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters",
)  # fmt: skip
# What every PEFT version knows; others write keys that older ones refuse.
_DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
    "init_lora_weights": True, "lora_dropout": 0.0, "fan_in_fan_out": False, "modules_to_save": None,
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "use_rslora": False,
}  # fmt: skip
# Without patterns and rank-stabilised scaling: one rank and one scale for all modules.
UNIFORM: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}


@dataclass(frozen=True)
class Serving:
    """What a command line needs: the base model by its public name and commit, the rank, and whether LoRA
    sits on the vision tower too."""

    base: str | None
    revision: str | None
    rank: int
    vision: bool = False


def adapter_problems(
    target: str, config: dict[str, Any], vision: Sequence[str] = (), allow_vision: bool = False
) -> list[str]:
    """Why `target` cannot load an adapter with this adapter_config.json, in words; empty if it can. `vision`:
    its modules outside the text decoder."""
    if target == "gguf":
        return ["llama.cpp takes no LoRA of vision-language models: merge it into its base first"]
    if target == "peft":
        return []
    found = [f"{key} is set, which {target} does not load" for key in _UNSERVED if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias is {config['bias']}, which {target} does not load")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        found.append(f"init_lora_weights is {init}, which changed the base model as well")
    if not isinstance(config.get("target_modules"), list):
        found.append(f"target_modules is no list, which {target} needs")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            found.append(f"{key} is set, which some versions of {target} leave out without a word")
    limit = VLLM_RANKS[-1] if target == "vllm" else None
    if limit is not None and config["r"] > limit:
        found.append(f"rank {config['r']} is above {limit}, the largest that vllm serves")
    return found + _module_problems(target, config, vision, allow_vision)


def _module_problems(
    target: str, config: dict[str, Any], vision: Sequence[str], allow_vision: bool
) -> list[str]:
    found = []
    if vision and target == "sglang":
        found.append(f"{vision[0]} is outside the text decoder, where sglang applies no LoRA")
    elif vision and not allow_vision:
        found.append(f"{vision[0]} is outside the text decoder: an experiment of vllm, so --allow-vision")
    if target == "sglang":
        if config.get("use_rslora"):
            found.append("use_rslora is set, which sglang leaves out without a word")
        leaves = {name.rsplit(".", 1)[-1] for name in config.get("target_modules") or ()}
        strange = sorted(leaves - set(SGLANG_MODULES)) if isinstance(config["target_modules"], list) else []
        if strange and not vision:
            found.append(f"{strange[0]} is no module that sglang puts LoRA on")
    return found


def check_merged(target: str, config: dict[str, Any], where: str) -> None:
    """Raises ConfigError unless `target` loads a merged model with this config.json."""
    if config.get("quantization_config"):
        raise ConfigError(f"{where} is quantized", "export the merge into the 16-bit base")
    if target != "gguf":
        return
    own = (config.get("architectures") or [None])[0]
    parts = [
        (config.get(f"{part}_config") or {}).get("architectures") or [own] for part in ("text", "vision")
    ]
    for name, known, purpose in ((parts[0][0], _TEXT, "text"), (parts[1][0], _MMPROJ, "image")):
        if name not in known:
            raise ConfigError(
                f"{where} names the architecture {name}, of which llama.cpp converts no {purpose} model",
                "a model class like Qwen2_5_VLForConditionalGeneration is needed; export for vllm or peft",
            )
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in ("bfloat16", "float16"):
        raise ConfigError(
            f"{where} is in {dtype}, the converter's folder should be in 16 bits",
            "vfl-train merge ... --dtype bfloat16",
        )


# --- the files -------------------------------------------------------------------------------------


def processor_files(folder: Path) -> list[Path]:
    """The processor, tokenizer and chat template files of a model folder."""
    return [folder / name for name in PROCESSOR if (folder / name).is_file()]


def adapter_config(info: AdapterInfo, modules: Sequence[str], **changes: Any) -> dict[str, Any]:
    """adapter_config.json with `modules` as the explicit list of targets and none of the keys that choose
    modules by pattern; `changes` are set last."""
    kept = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "task_type")
    value = {**_DEFAULTS, **{k: info.config[k] for k in kept if info.config.get(k) is not None}}
    value |= {
        "base_model_name_or_path": info.base_name, "revision": info.revision, "target_modules": list(modules)
    }  # fmt: skip
    return dict(sorted({**value, **changes}.items()))


def rewritten_weights(
    info: AdapterInfo, renamed: dict[str, str], tensors: dict[str, torch.Tensor] | None = None
) -> bytes:
    """The adapter's tensors (or `tensors`, under the adapter's names) as a safetensors file under the module
    names of `renamed`."""
    from safetensors.torch import load_file, save

    tensors = load_file(str(info.folder / WEIGHTS)) if tensors is None else tensors
    named = {}
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        named[f"{PEFT_PREFIX}{renamed[module]}.lora_{part}"] = tensor.contiguous()
    return save(named, metadata={"format": "pt"})


def scales(info: AdapterInfo) -> dict[str, tuple[int, float]]:
    """Module -> (rank, factor of B A) as PEFT reads rank_pattern, alpha_pattern and use_rslora. Raises
    ConfigError where the weights have another rank."""
    from peft.utils.other import get_pattern_key

    config, found = info.config, {}
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for module, (a, _) in lora_shapes(info.folder / WEIGHTS, PEFT_PREFIX).items():
        rank = ranks.get(get_pattern_key(list(ranks), module), config["r"])
        alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
        if a[0] != rank:
            raise ConfigError(
                f"{info.folder}: {module} has rank {a[0]} in the weights, {rank} by its configuration"
            )
        found[module] = (rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return found


def folded(info: AdapterInfo) -> tuple[dict[str, torch.Tensor], int, float]:
    """The adapter with one rank and one scale for all modules: (tensors, r, alpha). Smaller ranks are filled
    with zeros; scales go into B, in float32, so that nothing but float32's rounding changes."""
    import torch
    from safetensors.torch import load_file

    per_module, tensors = scales(info), load_file(str(info.folder / WEIGHTS))
    rank = max(r for r, _ in per_module.values())
    scale = max(s for _, s in per_module.values())
    out = {}
    for module, (own, factor) in per_module.items():
        a, b = (f"{PEFT_PREFIX}{module}.lora_{part}.weight" for part in "AB")
        pad = rank - own
        out[a] = torch.nn.functional.pad(tensors[a].float(), (0, 0, 0, pad))
        out[b] = torch.nn.functional.pad((tensors[b].double() * (factor / scale)).float(), (0, pad))
    alpha = scale * rank
    return out, rank, round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def is_uniform(info: AdapterInfo) -> bool:
    """Whether one rank and alpha hold for all modules, without rank-stabilised scaling."""
    return not any(info.config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora"))


# --- how to serve ----------------------------------------------------------------------------------


def adapter_commands(target: str, serving: Serving) -> str:
    """The command line that serves an adapter from its folder; empty for peft."""
    base = serving.base or "BASE_MODEL"
    pinned = f" --revision {serving.revision}" if serving.revision else ""
    if target == "vllm":
        rank = next(r for r in VLLM_RANKS if r >= serving.rank)
        tower = " --enable-tower-connector-lora" if serving.vision else ""
        return (
            f"vllm serve {base}{pinned} --enable-lora --max-lora-rank {rank}{tower} --lora-modules vfl={HERE}"
        )
    if target == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {base}{pinned} --enable-lora"
            f" --max-lora-rank {serving.rank} --lora-paths vfl={HERE}"
        )
    return ""


def merged_commands(target: str, config: dict[str, Any]) -> str:
    """The command lines that serve a merged model from its folder; empty for peft."""
    if target == "vllm":
        return f"vllm serve {HERE}"
    if target == "sglang":
        return f"python -m sglang.launch_server --model-path {HERE}"
    if target != "gguf":
        return ""
    kind = "bf16" if (config.get("dtype") or config.get("torch_dtype")) == "bfloat16" else "f16"
    # Reading and pointing suffer below that many image tokens (ggml-org/llama.cpp#16842).
    tokens = " --image-min-tokens 1024" if str(config.get("model_type", "")).startswith("qwen") else ""
    return "\n".join((
        f"python convert_hf_to_gguf.py {HERE} --outfile model.gguf --outtype {kind}",
        f"python convert_hf_to_gguf.py {HERE} --mmproj --outfile mmproj.gguf --outtype f16",
        f"llama-server -m model.gguf --mmproj mmproj.gguf{tokens}",
    ))  # fmt: skip


def serve_page(target: str, commands: str, model: str = "") -> str:
    """serve.md; `model`: the name to ask the server for."""
    ask = f" Ask for the model `{model}`." if model else ""
    names = {"vllm": "vLLM", "sglang": "SGLang", "gguf": "llama.cpp"}
    return f"# With {names[target]}\n\n```\n{commands}\n```\n\n{HERE} is this one.{ask}\n"
