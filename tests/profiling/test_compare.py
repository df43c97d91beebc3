"""`profile --adapter`: whether training moved the layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vfl_train.config import LoraConfig, ProfileConfig
from vfl_train.errors import ConfigError
from vfl_train.models import VisionLanguageModel
from vfl_train.profiling.compare import base_profile, compare
from vfl_train.profiling.run import profile
from vfl_train.runs import RunFolder
from vfl_train.schemas import FunctionProfile, Profile


def settings(output: Path, **more) -> ProfileConfig:
    return ProfileConfig(
        output=output, functions=("emotion",), pairs=2, control_pairs=0, device="cpu", model="phantom", **more
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base") / "profile"
    profile(settings(out))
    return out


def make_adapter(folder: Path, scale: float) -> Path:
    """LoRA on the layer that reads emotions, its B drawn at this scale."""
    from vfl_train.training.adapter import apply_lora, trainable_parameters
    from vfl_train.training.plan import build_plan, choose_layers
    from vfl_train.training.run import save_adapter_folder

    vlm = VisionLanguageModel.load("phantom", device="cpu")
    plan = build_plan(choose_layers(vlm.info, layers="3"), vlm, lora_r=4)
    adapted = apply_lora(vlm.model, plan, r=4, alpha=8, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(adapted):
            if "lora_B" in name:
                parameter.copy_(
                    scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                )
    config = LoraConfig(model="phantom", layers="3", data="rows.jsonl", output=folder)
    with RunFolder.open(folder, {"scale": scale}) as run:
        save_adapter_folder(adapted.eval(), vlm, plan, config, run)
    return folder


def test_an_adapter_that_changes_nothing_moves_nothing(tmp_path, base, capsys):
    adapter = make_adapter(tmp_path / "adapter", 0.0)
    assert base_profile(str(adapter)) is None and base_profile(None) is None
    (adapter / "profile.json").write_bytes((base / "profile.json").read_bytes())
    found = profile(settings(tmp_path / "out", adapter=str(adapter)))
    before = Profile.load(base).functions["emotion"]
    assert found.functions["emotion"].change_rate == before.change_rate
    # Of two pairs nothing is concluded, not even that nothing moved.
    assert found.compared_with == {"emotion": {"peak_layer": None, "flip_block": [], "largest_change": None}}
    assert "did training move the layers?" in capsys.readouterr().out
    assert Profile.load(tmp_path / "out").compared_with == found.compared_with
    other = profile(settings(tmp_path / "drop", adapter=str(adapter), intervention="drop"))
    assert other.compared_with == {} and "not compared with" in capsys.readouterr().out


def test_a_base_profile_of_another_model_is_refused(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", 0.1)
    value = json.loads((base / "profile.json").read_text(encoding="utf-8"))
    value["model"]["hidden_size"] = 3584
    (adapter / "profile.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ConfigError, match="hidden_size 3584"):
        profile(settings(tmp_path / "out", adapter=str(adapter)))
    assert not (tmp_path / "out").exists()


def test_what_moved():
    before = FunctionProfile("ok", 20, 20, [0.0, 0.9, 0.1], [], [], {}, 1, [1], [1], False)
    after = replace(before, change_rate=[0.0, 0.2, 0.8], peak_layer=2, flip_block=[2])
    base = Profile(None, "swap", "text", "engine", "", 0, {}, {}, {"ocr": before, "count": before})  # type: ignore[arg-type]
    found = compare(base, {"ocr": after, "emotion": after})
    assert found == {"ocr": {"peak_layer": 1, "flip_block": [1], "largest_change": pytest.approx(0.7)}}
    few = replace(after, status="not_measurable", pairs_answered=3)
    assert compare(base, {"ocr": few})["ocr"]["largest_change"] is None


def test_another_scale_of_the_adapter_is_another_run(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", 0.0)
    profile(settings(tmp_path / "out", adapter=str(adapter)))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}), encoding="utf-8")
    with pytest.raises(ConfigError, match="adapter"):
        profile(settings(tmp_path / "out", adapter=str(adapter)))
