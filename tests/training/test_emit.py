"""Plans for other trainers: their rules for matching names, written down again, give exactly the plan."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from torch import nn

from vfl_train.config import PlanConfig
from vfl_train.models import VisionLanguageModel
from vfl_train.schemas import FunctionProfile, Profile
from vfl_train.training.adapter import adapted_modules
from vfl_train.training.emit import SETTINGS, emit_plan, name_pattern
from vfl_train.training.plan import LayerPlan, build_plan, choose_layers

# LLaMA-Factory model/model_utils/visual.py at ff6d4d12: what COMPOSITE_MODELS forbids with the vision tower
# and projector frozen and the language model not (get_forbidden_modules), and lora_conflict_keys.
FORBIDDEN = {
    "qwen2_5_vl": ["visual.patch_embed", "visual.blocks", "visual.merger", "patch_embed"],
    "llava": ["vision_tower", "multi_modal_projector"],
    "gemma3": ["vision_tower", "multi_modal_projector"],
}


@pytest.fixture(params=FORBIDDEN)
def planned(request: pytest.FixtureRequest) -> tuple[str, VisionLanguageModel, LayerPlan]:
    """Layers 1 and 3 of a family's tiny model; its vision tower has a layer 1 with the same names."""
    model, processor = FAMILIES[request.param]()
    vlm = VisionLanguageModel(model, processor, f"org/{request.param}")
    return request.param, vlm, build_plan(choose_layers(vlm.info, layers="1,3"), vlm, lora_r=16)


def peft_takes(vlm: VisionLanguageModel, targets: list[str] | str) -> set[str]:
    """Modules that PEFT really adapts."""
    return adapted_modules(get_peft_model(vlm.model, LoraConfig(r=4, target_modules=targets)))


def test_peft_adapts_the_plan(planned) -> None:
    _, vlm, plan = planned
    arguments = json.loads(SETTINGS["peft"](plan))
    assert peft_takes(vlm, LoraConfig(**arguments).target_modules and arguments["target_modules"]) == set(
        plan.module_names
    )


def test_llamafactory_adapts_the_plan(planned) -> None:
    family, vlm, plan = planned
    settings = yaml.safe_load(SETTINGS["llamafactory"](plan))
    assert settings["freeze_language_model"] is False and settings["freeze_vision_tower"] is True
    targets = [t.strip() for t in settings["lora_target"].split(",")]  # finetuning_args.py split_arg
    # visual.py patch_target_modules: any part of the name will do, modules of all kinds are taken.
    names = [
        name
        for name, _ in vlm.model.named_modules()
        if any(t in name for t in targets) and not any(f in name for f in FORBIDDEN[family])
    ]
    assert set(names) == set(plan.module_names)
    modules = dict(vlm.model.named_modules())
    assert all(isinstance(modules[name], nn.Linear) for name in names)
    assert peft_takes(vlm, names) == set(plan.module_names)


def test_a_container_would_be_taken_by_llamafactory(planned) -> None:
    """The check above can fail: an entry that ends at a layer takes what PEFT cannot adapt."""
    _, vlm, plan = planned
    names = [n for n, _ in vlm.model.named_modules() if plan.module_names[0].rsplit(".", 2)[0] in n]
    assert set(names) - set(plan.module_names)


def test_swift_adapts_the_plan(planned) -> None:
    _, vlm, plan = planned
    words = shlex.split(SETTINGS["swift"](plan).replace("\\\n", " "), comments=True)
    assert words[:2] == ["swift", "sft"]
    pattern = words[words.index("--target_regex") + 1]
    assert pattern.startswith("^") and pattern.endswith("$")
    # pipelines/train/tuner.py get_target_modules at 3602360a: a string goes to PEFT as it is.
    assert peft_takes(vlm, pattern) == set(plan.module_names)


def test_axolotl_adapts_the_plan(planned) -> None:
    _, vlm, plan = planned
    settings = yaml.safe_load(SETTINGS["axolotl"](plan))
    assert settings["lora_target_linear"] is False
    targets = settings["lora_target_modules"]
    for target in targets:  # utils/schemas/config.py check_lora_target_modules_regex at 067b021c
        re.compile(target)
    assert peft_takes(vlm, targets) == set(plan.module_names)  # loaders/adapter.py: the list goes to PEFT


NAMES = [
    f"model.language_model.layers.{k}.{leaf}" for k in (1, 2, 11, 12, 21) for leaf in ("a.q", "b.up", "b.u")
]


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_a_pattern_matches_its_names_and_no_others(chosen: set[str]) -> None:
    pattern = re.compile(name_pattern(sorted(chosen)))
    strangers = [*NAMES, *(f"x.{n}" for n in NAMES), *(f"{n}.base" for n in NAMES)]
    strangers += [n.replace(".layers.", "_layers.") for n in NAMES]
    assert {name for name in strangers if pattern.fullmatch(name)} == chosen


def test_layers_with_the_same_linears_share_a_part() -> None:
    names = [f"m.layers.{k}.{leaf}" for k in (3, 4) for leaf in ("q", "o")]
    assert name_pattern(names) == r"^(m\.layers\.(3|4)\.(o|q))$"


@pytest.mark.parametrize("emit", SETTINGS)
def test_the_command_prints_what_can_be_pasted(emit: str, base_folder, tmp_path, capsys) -> None:
    from vfl_train.training.skeleton import load_skeleton

    flat = [0.0] * 12
    measured = FunctionProfile(
        status="ok", pairs=50, pairs_answered=50, change_rate=flat, flip_rate=flat, ci95=[[0.0, 0.1]] * 12,
        controls={}, peak_layer=10, layers=[9, 10], flip_block=[10], distributed=False,
    )  # fmt: skip
    info = load_skeleton(str(base_folder)).info
    profile = Profile(info, "swap", "text", "reference", "float32", 0, {}, {}, {"ocr": measured})
    (tmp_path / "profile.json").write_text(json.dumps(profile.to_json()), encoding="utf-8")
    emit_plan(PlanConfig(profile=str(tmp_path), model=str(base_folder), emit=emit))
    out = capsys.readouterr().out
    assert re.findall(r"layers\\?\.\(?(\d+)", out) and set(re.findall(r"layers\\?\.\(?(\d+)", out)) == {"10"}
    assert str(base_folder.parent) not in out
