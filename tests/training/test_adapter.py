"""LoRA sits on the planned modules, nowhere else, and is saved by full names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from vfl_train.errors import ConfigError, NumericError
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import family_of
from vfl_train.schemas import ModelInfo
from vfl_train.training.adapter import (
    adapted_modules,
    adapter_config,
    adapter_weights,
    apply_lora,
    check_injection,
    trainable_parameters,
)
from vfl_train.training.plan import LayerPlan, build_plan, choose_layers


@pytest.fixture
def vlm(base_folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(str(base_folder), device="cpu")


def make_plan(vlm: VisionLanguageModel, layers: str) -> LayerPlan:
    return build_plan(choose_layers(vlm.info, layers=layers), vlm, lora_r=4)


@pytest.mark.parametrize("layers", ["10", "0-11", "1,11"])
def test_exactly_the_planned_modules_are_adapted(vlm: VisionLanguageModel, layers: str) -> None:
    plan = make_plan(vlm, layers)
    adapted = apply_lora(vlm.model, plan, r=4, alpha=8)
    assert adapted_modules(adapted) == set(plan.module_names)
    assert all("language_model.layers" in name for name, _ in trainable_parameters(adapted))
    assert sum(p.numel() for _, p in trainable_parameters(adapted)) == plan.trainable_parameters
    assert not any("visual" in name for name in adapted_modules(adapted))


def test_a_name_that_also_matches_elsewhere_is_noticed(vlm: VisionLanguageModel) -> None:
    """`blocks.1.mlp.gate_proj` would also be found in the vision tower by its suffix."""
    plan = make_plan(vlm, "1")
    loose = dataclasses.replace(plan, module_names=("mlp.gate_proj",))
    with pytest.raises(ConfigError, match="other modules than planned"):
        apply_lora(vlm.model, loose, r=4, alpha=8)


def test_anything_else_that_trains_is_noticed(vlm: VisionLanguageModel) -> None:
    plan = make_plan(vlm, "3")
    adapted = apply_lora(vlm.model, plan, r=4, alpha=8)
    next(vlm.model.model.visual.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match=r"visual.* is trainable"):
        check_injection(adapted, plan)


def test_the_seed_decides_the_start_and_leaves_the_global_state_alone(base_folder: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        vlm = VisionLanguageModel.load(str(base_folder), device="cpu")
        torch.manual_seed(123)
        adapted = apply_lora(vlm.model, make_plan(vlm, "3"), r=4, alpha=8, seed=seed)
        drawn.append(torch.rand(1).item())
        return torch.cat([p.detach().flatten() for n, p in trainable_parameters(adapted) if "lora_A" in n])

    drawn: list[float] = []
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert len(set(drawn)) == 1


def test_the_configuration_lists_full_names_though_peft_shortens_them(vlm: VisionLanguageModel) -> None:
    plan = make_plan(vlm, "0-11")  # 84 names: PEFT shortens from 20 on
    adapted = apply_lora(vlm.model, plan, r=4, alpha=8)
    assert set(adapted.peft_config["default"].target_modules) != set(plan.module_names)
    value = json.loads(json.dumps(adapter_config(adapted, plan, "phantom", "abc")))
    assert value["target_modules"] == list(plan.module_names)
    assert (value["base_model_name_or_path"], value["revision"]) == ("phantom", "abc")
    assert (value["peft_type"], value["task_type"]) == ("LORA", "CAUSAL_LM")
    assert value["inference_mode"] is True
    assert not value["layers_to_transform"] and not value["rank_pattern"]
    assert "megatron_core" not in value  # defaults of rarely used keys are not written


def test_weights_that_are_not_finite_are_not_saved(vlm: VisionLanguageModel) -> None:
    adapted = apply_lora(vlm.model, make_plan(vlm, "3"), r=4, alpha=8)
    assert len(load(adapter_weights(adapted))) == 14
    with torch.no_grad():
        trainable_parameters(adapted)[3][1][0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"layers\.3"):
        adapter_weights(adapted)


def test_a_tower_with_the_same_module_names_is_left_alone() -> None:
    """LLaVA's CLIP tower has `layers.N.self_attn.q_proj` too."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=32),
        image_token_index=31,
    )
    model = LlavaForConditionalGeneration(config)
    layers = [f"model.language_model.layers.{i}" for i in range(3)]
    parts = ("self_attn.q_proj", "self_attn.v_proj")
    vlm = SimpleNamespace(
        model=model, base=model, config=config, model_type="llava", family=family_of("llava"),
        info=ModelInfo("tiny", None, "llava", 3, 16), layer_names=layers,
        linear_names=lambda layer: [f"{layers[layer]}.{part}" for part in parts],
    )  # fmt: skip
    plan = build_plan(choose_layers(vlm.info, layers="1"), vlm, lora_r=4)
    adapted = apply_lora(model, plan, r=4, alpha=8)
    assert adapted_modules(adapted) == {f"model.language_model.layers.1.{part}" for part in parts}
    reasons = {group["name"]: group["reason"] for group in plan.skipped}
    assert reasons["model.vision_tower"].startswith("vision tower")
    assert reasons["model.multi_modal_projector"].startswith("connector")
