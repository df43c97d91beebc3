"""LoRA on exactly the modules of a plan, and the adapter folder that plain PEFT loads.

PEFT matches target names as suffixes and, from 20 names on, shortens them to suffixes of its own; both
are harmless only if checked. So the injected set is compared with the plan, and the saved
configuration holds the plan's full names.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save

from vfl_train.errors import ConfigError, NumericError
from vfl_train.training.deepspeed import gathered, master_weights
from vfl_train.training.plan import LayerPlan, peft_arguments

PEFT_PREFIX = "base_model.model."
# What every PEFT reader expects; other keys are written only where they differ from PEFT's default, so
# that older PEFT versions do not meet keys they do not know.
_CONFIG_KEYS = {
    "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "alpha_pattern", "revision", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def apply_lora(
    model: torch.nn.Module, plan: LayerPlan, *, r: int, alpha: int, dropout: float = 0.0, seed: int = 0
) -> PeftModel:
    """Freeze `model` and put LoRA on the plan's modules; A is drawn from `seed`, B is zero.

    Raises:
        ConfigError: PEFT adapted other modules than planned, or something else is trainable.
    """
    config = PeftLoraConfig(**peft_arguments(plan, r=r, alpha=alpha, dropout=dropout))
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    check_injection(adapted, plan)
    return adapted


def adapted_modules(model: torch.nn.Module) -> set[str]:
    """Full names, in the base model, of all modules that carry an adapter."""
    return {
        name.removeprefix(PEFT_PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def check_injection(model: PeftModel, plan: LayerPlan) -> None:
    """Raises ConfigError unless exactly the planned modules are adapted and only LoRA is trainable."""
    found, planned = adapted_modules(model), set(plan.module_names)
    if found != planned:
        missing, extra = sorted(planned - found), sorted(found - planned)
        first = f"missing {missing[0]}" if missing else f"unplanned {extra[0]}"
        counts = f"{len(missing)} missing, {len(extra)} unplanned"
        raise ConfigError(f"LoRA went into other modules than planned: {counts} ({first})")
    for name, parameter in model.named_parameters():
        module = name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]
        if parameter.requires_grad and module not in planned:
            raise ConfigError(f"{name} is trainable but not in the plan")


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of everything that is trained."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def check_finite(model: torch.nn.Module) -> None:
    """Raises NumericError naming the first trained parameter with a non-finite entry."""
    for name, parameter in trainable_parameters(model):
        with gathered([parameter]):
            finite = bool(torch.isfinite(parameter).all())
        if not finite:
            raise NumericError(
                f"{name.removeprefix(PEFT_PREFIX)} is not finite; nothing was saved",
                "lower learning_rate or max_grad_norm, or check the rows",
            )


def adapter_config(model: PeftModel, plan: LayerPlan, base_name: str, revision: str | None) -> dict[str, Any]:
    """Content of `adapter_config.json`: the plan's explicit names, and the base as the user named it."""
    config = model.peft_config["default"]
    defaults = PeftLoraConfig().to_dict()
    value = {k: v for k, v in config.to_dict().items() if k in _CONFIG_KEYS or v != defaults.get(k)}
    value.update(
        base_model_name_or_path=base_name,
        revision=revision,
        inference_mode=True,
        target_modules=list(plan.module_names),
    )
    for key in ("peft_type", "task_type"):
        value[key] = getattr(value[key], "value", value[key])
    return dict(sorted(value.items()))


def adapter_weights(model: PeftModel) -> bytes:
    """The LoRA tensors under PEFT's key names, as a safetensors file. All processes of a run must call.

    Raises:
        NumericError: a parameter is not finite.
    """
    check_finite(model)
    weights = master_weights(trainable_parameters(model))  # gathered, where ZeRO holds them in slices
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, metadata={"format": "pt"})
