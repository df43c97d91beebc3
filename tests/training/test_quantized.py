"""LoRA on weights in 4 and 8 bits: what is quantized, that training reaches every module, what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfl_train.config import LoraConfig
from vfl_train.errors import ConfigError
from vfl_train.models import VisionLanguageModel, quantize, vlm
from vfl_train.options import Config
from vfl_train.schemas import FunctionProfile, ModelInfo, Profile
from vfl_train.training.run import train_lora

MakeConfig = Callable[..., LoraConfig]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra `quant`)"
)
LOADING = {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have `package` seem not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_the_linears_of_the_decoder_layers_are_quantized_and_nothing_else(
    bits: int, base_folder: Path
) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = {4: Linear4bit, 8: Linear8bitLt}[bits]
    model = VisionLanguageModel.load(str(base_folder), device="cpu", **LOADING[bits])
    linears = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, kind)}
    assert quantized == {n for n in linears if n.startswith(f"{model.decoder_name}.")}
    assert {type(m) for n, m in linears.items() if n not in quantized} == {torch.nn.Linear}
    if bits == 4:
        weight = linears[sorted(quantized)[0]].weight
        assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
        assert linears[sorted(quantized)[0]].compute_dtype == torch.float32  # the CPU's `auto`


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_lora_trains_on_it_and_names_the_16_bit_base(
    bits: int, make_config: MakeConfig, base_folder: Path, tmp_path: Path
) -> None:
    from dist_worker import Observed

    with Observed() as seen:
        folder = train_lora(make_config(tmp_path / "adapter", max_steps=4, **LOADING[bits]))
    assert len(seen.gradients) == 21
    assert all(bool(g.any()) for g in seen.gradients.values())
    assert seen.below == {}
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    changed = [bool(w.any()) for name, w in weights.items() if "lora_B" in name]
    assert len(changed) == 21 and all(changed)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    assert "quantization_config" not in json.dumps(config)
    reference = json.loads((folder / "logits_reference.json").read_text())
    assert reference["quantization"][f"load_in_{bits}bit"] is True  # whose logits they are
    on_base = VisionLanguageModel.load(str(base_folder), device="cpu", adapter=str(folder))
    assert on_base.dtype == "float32"


def write_profile(folder: Path) -> Path:
    """A profile of the tiny model in which ocr is read in layer 10."""
    flat = [0.0] * 12
    ocr = FunctionProfile("ok", 50, 50, flat, flat, [[0.0, 0.1]] * 12, {}, 10, [9, 10], [10], False)
    info = ModelInfo("base", None, "qwen2_5_vl", 12, 192)
    value = Profile(info, "swap", "text", "reference", "float32", 0, {}, {}, {"ocr": ocr})
    (folder / "profile.json").write_text(json.dumps(value.to_json()), encoding="utf-8")
    return folder / "profile.json"


def test_every_command_passes_both_options_on(
    base_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command that loads a model takes the options; one that drops them would load 16 bits silently."""
    from vfl_train.config import EvalConfig, KnockoutConfig, ProfileConfig, SelectConfig
    from vfl_train.data_select.run import select
    from vfl_train.evaluation.run import evaluate
    from vfl_train.knockout.run import run_knockout
    from vfl_train.profiling.run import profile

    class Loaded(Exception):
        pass

    def load(cls: type, *args: object, **options: object) -> None:
        bound = inspect.signature(original).bind(*args, **options)
        raise Loaded(bound.arguments.get("load_in_4bit"), bound.arguments.get("load_in_8bit"))

    original = VisionLanguageModel.load
    monkeypatch.setattr(VisionLanguageModel, "load", classmethod(load))
    out, data = tmp_path / "out", str(data_file)
    calls: list[tuple[Callable, Config]] = [
        (profile, ProfileConfig(output=out)),
        (evaluate, EvalConfig(output=out)),
        (run_knockout, KnockoutConfig(output=out, data=data)),
        (select, SelectConfig(output=out, data=data, budget="0.5", profile=str(write_profile(tmp_path)))),
    ]
    for call, config in calls:
        for bits, wanted in ((4, (True, False)), (8, (False, True))):
            with pytest.raises(Loaded) as raised:
                call(dataclasses.replace(config, model=str(base_folder), device="cpu", **LOADING[bits]))
            assert raised.value.args == wanted, call.__name__


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bitsandbytes_the_pip_command_is_named(bits: int, make_config, tmp_path, monkeypatch) -> None:
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(
        ConfigError, match=rf"{bits}bit needs the package bitsandbytes.*pip install.*\[quant\]"
    ):
        train_lora(make_config(tmp_path / "adapter", **LOADING[bits]))
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_is_quantized_already_is_refused(base_folder: Path, tmp_path: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized weights already"):
        quantize.quantization(tmp_path, 4, torch.float32)


# --- attention -------------------------------------------------------------------------------------


def test_flash_attention_without_its_package(make_config: MakeConfig, tmp_path: Path, monkeypatch) -> None:
    without(monkeypatch, "flash_attn")
    with pytest.raises(ConfigError, match=r"needs the package flash-attn.*pip install 'vfl-train\[flash\]'"):
        train_lora(make_config(tmp_path / "adapter", attn_implementation="flash_attention_2"))
    assert not (tmp_path / "adapter").exists()


def test_flash_attention_is_asked_for_where_the_package_is(base_folder: Path, monkeypatch) -> None:
    asked: list[object] = []

    class Asked(Exception):
        pass

    def load(loader: object, folder: Path, **options: object) -> object:
        if "attn_implementation" not in options:
            return original(loader, folder, **options)
        asked.append(options["attn_implementation"])
        raise Asked

    original = vlm._load
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "flash_attn" else find(name, *a)
    )
    monkeypatch.setattr(vlm, "_load", load)
    with pytest.raises(Asked):
        VisionLanguageModel.load(str(base_folder), device="cpu", attn_implementation="flash_attention_2")
    assert asked == ["flash_attention_2"]


def test_eager_attention_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = train_lora(make_config(tmp_path / "adapter", attn_implementation="eager", max_steps=1))
    assert (folder / "adapter_model.safetensors").is_file()
