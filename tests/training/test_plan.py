"""Layer choice, controls and the plan itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vfl_train.errors import ConfigError
from vfl_train.options import format_layers
from vfl_train.schemas import FunctionProfile, ModelInfo, Profile
from vfl_train.training.controls import apply_control
from vfl_train.training.plan import build_plan, choose_layers, parse_layers

MODEL = ModelInfo("phantom", None, "qwen2_5_vl", 12, 160)


def function(layers: list[int], block: list[int], status: str = "ok") -> FunctionProfile:
    flat = [0.0] * 12
    return FunctionProfile(
        status=status, pairs=50, pairs_answered=50 if status == "ok" else 3, change_rate=flat, flip_rate=flat,
        ci95=[[0.0, 0.1]] * 12, controls={}, peak_layer=None, layers=layers, flip_block=block,
        distributed=False,
    )  # fmt: skip


def profile(model: ModelInfo = MODEL) -> Profile:
    functions = {
        "ocr": function([9, 10], [10]),
        "count": function([4, 5, 6], [5, 6]),
        "emotion": function([], [], "not_measurable"),
    }
    return Profile(model, "swap", "text", "reference", "float32", 0, {}, {}, functions)


@given(st.sets(st.integers(0, 39), min_size=1))
def test_layers_survive_writing_and_reading(layers: set[int]) -> None:
    ordered = tuple(sorted(layers))
    assert parse_layers(format_layers(ordered), 40) == ordered


def test_ranges_are_inclusive_and_zero_based() -> None:
    assert parse_layers("20-23,25", 28) == (20, 21, 22, 23, 25)
    assert parse_layers("0", 1) == (0,)


@pytest.mark.parametrize("text", ["", " , ", "a", "3-", "-3", "5-2", "1.5", "3 4"])
def test_bad_layers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_layers(text, 12)


def test_an_index_out_of_range_is_named_with_the_depth() -> None:
    with pytest.raises(ConfigError, match=r"layer 12 .* 12 layers"):
        parse_layers("3,10-12", 12)


def test_function_layers_follow_the_rule() -> None:
    block = choose_layers(MODEL, profile=profile(), functions=["ocr", "count"])
    assert block.layers == (5, 6, 10)
    assert block.functions == {"ocr": [10], "count": [5, 6]}
    paper = choose_layers(MODEL, profile=profile(), functions=["ocr"], layer_rule="paper")
    assert paper.layers == (9, 10)


def test_not_measurable_and_unknown_functions_are_refused() -> None:
    with pytest.raises(ConfigError, match="emotion was not measurable"):
        choose_layers(MODEL, profile=profile(), functions=["emotion"])
    with pytest.raises(ConfigError, match="'relation'"):
        choose_layers(MODEL, profile=profile(), functions=["relation"])


@pytest.mark.parametrize("changes", [{"model_type": "llava"}, {"num_layers": 13}, {"hidden_size": 161}])
def test_a_profile_of_another_model_is_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        choose_layers(dataclasses.replace(MODEL, **changes), profile=profile(), functions=["ocr"])


def test_another_name_or_revision_is_warned_about() -> None:
    model = dataclasses.replace(MODEL, name_or_path="other", revision="abc")
    choice = choose_layers(model, profile=profile(), functions=["ocr"])
    assert len(choice.warnings) == 2


def test_nothing_or_both_named_is_refused() -> None:
    for arguments in ({}, {"profile": profile()}, {"layers": "1", "functions": ["ocr"]}):
        with pytest.raises(ConfigError):
            choose_layers(MODEL, **arguments)


def test_control_all_needs_no_layers() -> None:
    assert choose_layers(MODEL, control="all").layers == tuple(range(12))


@given(
    st.sets(st.integers(0, 11), min_size=1, max_size=6),
    st.integers(0, 5),
    st.sampled_from(["random", "reversed"]),
)
def test_controls_are_disjoint_and_of_equal_size(layers: set[int], seed: int, control: str) -> None:
    found = apply_control(sorted(layers), 12, control, seed)
    assert len(found) == len(layers) == len(set(found))
    assert not set(found) & layers
    assert list(found) == sorted(found)
    assert found == apply_control(sorted(layers), 12, control, seed)


def test_reversed_is_the_other_half_and_else_the_farthest_layers() -> None:
    assert apply_control(range(6), 12, "reversed", 0) == tuple(range(6, 12))
    assert apply_control([10], 12, "reversed", 0) == (0,)


@pytest.mark.parametrize("control", ["random", "reversed"])
def test_a_control_without_enough_other_layers_is_refused(control: str) -> None:
    with pytest.raises(ConfigError, match="8 of 12"):
        apply_control(range(8), 12, control, 0)


def test_the_plan_names_every_module_and_what_is_skipped(skeleton) -> None:
    plan = build_plan(choose_layers(skeleton.info, layers="7-8,10"), skeleton, lora_r=16)
    assert len(plan.module_names) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in plan.module_names)
    text = skeleton.model.config.get_text_config()
    width, inner = text.hidden_size, text.intermediate_size
    assert plan.trainable_parameters == 3 * 16 * (4 * 2 * width + 3 * (width + inner))
    linears = sum(group["linears"] for group in plan.skipped)
    reasons = {group["reason"] for group in plan.skipped}
    tower = sum(isinstance(m, torch.nn.Linear) for m in skeleton.model.model.visual.modules())
    assert linears == 9 * 7 + 1 + tower  # other layers, output head, vision tower and connector
    assert any("vision tower" in reason for reason in reasons)
    value = json.loads(json.dumps(plan.to_json()))
    assert value["layers"] == [7, 8, 10]
    assert value["model"]["num_layers"] == 12


@pytest.mark.parametrize("control", ["random", "reversed"])
def test_a_control_is_of_equal_size_and_the_plan_says_what_it_replaces(skeleton, control: str) -> None:
    known = profile(skeleton.info)
    choices = [
        choose_layers(skeleton.info, profile=known, functions=["ocr", "count"], control=c)
        for c in (None, control)
    ]
    plain, replaced = (build_plan(choice, skeleton, 8) for choice in choices)
    assert len(replaced.module_names) == len(plain.module_names)
    assert replaced.trainable_parameters == plain.trainable_parameters
    assert not set(replaced.layers) & set(plain.layers)
    value = json.loads(json.dumps(replaced.to_json()))
    assert (value["control"], value["functions"]) == (control, {"ocr": [10], "count": [5, 6]})
    assert value["layers"] == list(replaced.layers) and plain.to_json()["control"] is None


@pytest.fixture(scope="module")
def skeleton(base_folder):
    from vfl_train.training.skeleton import load_skeleton

    return load_skeleton(str(base_folder))


def test_a_skeleton_has_no_weights(skeleton) -> None:
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}
