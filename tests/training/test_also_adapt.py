"""Vision tower and connector: out of every plan unless asked for, trained and loadable when they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_vlm

from vfl_train.config import LoraConfig
from vfl_train.errors import ConfigError
from vfl_train.hub.load import load_adapter
from vfl_train.training.adapter import adapted_modules, apply_lora, check_injection
from vfl_train.training.plan import build_plan, choose_layers
from vfl_train.training.run import train_lora

PARTS = ("connector", "vision")


def plan_of(family: str, *parts: str):
    vlm = tiny_vlm(family)
    return vlm, build_plan(choose_layers(vlm.info, layers="2"), vlm, 4, parts)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "internvl", "gemma3", "idefics3"])
def test_a_plan_stays_in_the_decoder_unless_asked(family: str) -> None:
    vlm, plan = plan_of(family)
    assert all(name.startswith(f"{vlm.decoder_name}.2.") for name in plan.module_names)
    assert plan.also_adapts == () and plan.lowest_layer == 2
    _, wider = plan_of(family, "vision")
    added = set(wider.module_names) - set(plan.module_names)
    assert added and not any(name.startswith(vlm.decoder_name) for name in added)
    assert (wider.also_adapts, wider.lowest_layer) == (("vision",), 0)
    assert wider.trainable_parameters > plan.trainable_parameters
    groups = [sum(g["linears"] for g in p.skipped if "vision tower" in g["reason"]) for p in (plan, wider)]
    assert groups == [len(added), 0]


def test_the_injected_set_is_checked_against_the_wider_plan() -> None:
    from tiny_models import FAMILIES

    from vfl_train.models import VisionLanguageModel

    vlm = VisionLanguageModel(*FAMILIES["qwen3_vl"](), "tiny")
    plan = build_plan(choose_layers(vlm.info, layers="1"), vlm, 4, PARTS)
    adapted = apply_lora(vlm.model, plan, r=4, alpha=8)
    assert adapted_modules(adapted) == set(plan.module_names)
    assert plan.part_modules == {"connector": 6, "vision": 12}
    narrow = build_plan(choose_layers(vlm.info, layers="1"), vlm, 4)
    with pytest.raises(ConfigError, match="18 unplanned"):
        check_injection(adapted, narrow)


def test_the_connector_of_gemma_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="connector of this gemma3"):
        plan_of("gemma3", "connector")


def test_all_of_it_is_trained_and_loads_again(
    make_config: Callable[..., LoraConfig], tmp_path: Path, base_folder: Path, caplog
) -> None:
    """The gradient check of the first step covers the parts too."""
    folder = train_lora(make_config(tmp_path / "a", layers="10", also_adapt=PARTS))
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["part_modules"] == {"connector": 2, "vision": 15}
    assert "model.visual.merger.mlp.2" in plan["module_names"]
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == plan["module_names"]
    assert "--enable-tower-connector-lora" in caplog.text
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(base_folder)
    assert adapted_modules(load_adapter(base, str(folder))) == set(plan["module_names"])


def test_an_unknown_part_is_refused(make_config: Callable[..., LoraConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--also-adapt 'projector' is unknown"):
        make_config(tmp_path, also_adapt=("projector",))
