"""Export for PEFT, vLLM, SGLang and llama.cpp, judged by what these programs do with a folder.

vLLM, SGLang and llama.cpp are not installed here: what they check is written down again below, from their
sources (paths and commits at each).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import remade
from safetensors.torch import load_file, save_file

from vfl_train.config import ExportConfig, MergeConfig, MigrateConfig, VerifyConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.export import export
from vfl_train.hub.load import check_adapter
from vfl_train.hub.merge import merge
from vfl_train.hub.migrate import migrate
from vfl_train.hub.samples import relative_difference
from vfl_train.hub.targets import adapter_problems, check_merged, folded, scales
from vfl_train.hub.verify import verify

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# --- vLLM ------------------------------------------------------------------------------------------

# vllm/lora/lora_model.py at 0306474, check_unexpected_modules: the last part of each key's module.
VLLM_EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# hf_to_vllm_mapper of vllm/model_executor/models/{qwen2_5_vl,llava,gemma3_mm}.py; "before": without the names
# that came with transformers 4.52 (vllm-project/vllm#18983, #19054).
VLLM_MAPPERS = {
    "qwen2_5_vl": {
        "now": {"model.language_model.": "language_model.model.", "model.visual.": "visual.",
                "lm_head.": "language_model.lm_head.", "model.": "language_model.model."},
        "before": {"lm_head.": "language_model.lm_head.", "model.": "language_model.model."},
    },
    "llava": {
        "now": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.",
                "lm_head.": "language_model.lm_head."},
        "before": {},
    },
    "gemma3": {
        "now": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.",
                "lm_head.": "language_model.lm_head."},
        "before": {},
    },
}  # fmt: skip
VLLM_LAYER = re.compile(r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\Z")


def vllm_complaints(config: dict[str, Any], max_lora_rank: int) -> list[str]:
    """vllm/lora/peft_helper.py, PEFTHelper._validate_features and validate_legal."""
    init = config.get("init_lora_weights", True)
    plain = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    wrong = {
        "modules_to_save": config.get("modules_to_save"), "DoRA": config.get("use_dora"),
        "lora_bias": config.get("lora_bias"), "init": isinstance(init, str) and init.lower() not in plain,
        "aLoRA": config.get("alora_invocation_tokens"), "replication": config.get("layer_replication"),
        "BD-LoRA": config.get("use_bdlora"), "QALoRA": config.get("use_qalora"),
        "bias": config.get("bias", "none") != "none", "rank": rank > max_lora_rank,
    }  # fmt: skip
    return [name for name, is_wrong in wrong.items() if is_wrong]


def vllm_modules(folder: Path, prefixes: dict[str, str]) -> dict[str, str]:
    """Key -> module in vLLM: vllm/lora/utils.py parse_fine_tuned_lora_name, WeightsMapper._map_name."""
    found = {}
    for key in load_file(str(folder / WEIGHTS)):
        name = key.replace("base_model.model.", "")
        name = next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), name)
        parts = name.split(".")
        assert parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"), f"{key}: unsupported LoRA weight"
        found[key] = ".".join(parts[:-2])
    return found


@pytest.fixture
def shipped(plain_adapter, tiny_base, tmp_path: Path):
    """Exports an adapter of plain PEFT (taken in by migrate) for a target."""

    def ship(family: str, target: str, changes: dict[str, Any] | None = None, **settings: Any) -> Path:
        folder = plain_adapter(family, **settings)
        base = str(tiny_base(family))
        came_in = migrate(MigrateConfig(adapter=folder, output=tmp_path / f"{folder.name}-in", model=base))
        wanted = {"source": came_in, "output": tmp_path / "out", "target": target, "base": base}
        return export(ExportConfig(**{**wanted, **(changes or {})}))

    return ship


@pytest.mark.parametrize("family", VLLM_MAPPERS)
def test_vllm_finds_every_module_of_an_adapter(family: str, shipped) -> None:
    output = shipped(family, "vllm")
    config = json.loads((output / CONFIG).read_text())
    command = (output / "serve.md").read_text()
    allowed = int(re.search(r"--max-lora-rank (\d+)", command)[1])
    assert allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py MaxLoRARanks
    assert vllm_complaints(config, allowed) == [] and allowed == 8
    for prefixes in VLLM_MAPPERS[family].values():
        modules = set(vllm_modules(output, prefixes).values())
        assert len(modules) == 4 and all(VLLM_LAYER.match(m) for m in modules)
        assert {m.rsplit(".", 1)[1] for m in modules} <= VLLM_EXPECTED


def test_names_of_today_would_be_lost_in_older_vllm(shipped) -> None:
    """The check above can fail: an export for PEFT has names that vLLM before #19054 puts nowhere."""
    output = shipped("qwen2_5_vl", "peft")
    modules = vllm_modules(output, VLLM_MAPPERS["qwen2_5_vl"]["before"]).values()
    assert not any(VLLM_LAYER.match(m) for m in modules)


# --- SGLang ----------------------------------------------------------------------------------------


def sglang_modules(config: dict[str, Any]) -> set[str]:
    """python/sglang/srt/lora/lora_manager.py init_lora_shapes and lora/utils.py get_normalized_target_modules
    (at 01235a1): a list, of which the last dotted part counts."""
    targets = config["target_modules"]
    assert isinstance(targets, list), "SGLang infers LoRA target modules from a list only"
    stacked = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
               "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # fmt: skip
    return {stacked.get(name.split(".")[-1], name.split(".")[-1]) for name in targets}


@pytest.mark.parametrize("family", VLLM_MAPPERS)
def test_sglang_finds_every_module_of_an_adapter(family: str, shipped) -> None:
    output = shipped(family, "sglang")
    config = json.loads((output / CONFIG).read_text())
    # lora_manager.py validate_new_adapter: no DoRA, no added tokens; utils.py _KNOWN_LORA_TARGET_MODULES.
    assert not config.get("use_dora") and not (output / "added_tokens.json").exists()
    assert sglang_modules(config) == {"qkv_proj", "o_proj"}
    # lora_config.py _pattern_overrides (at 0ceb81f): what differs from r and lora_alpha; lora.py: alpha / r.
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    for key in load_file(str(output / WEIGHTS)):  # lora.py _process_weight: get_layer_id
        assert re.search(r"layers\.(\d+)\.", key)
        assert "visual" not in key and "vision" not in key
    assert "--lora-paths vfl=THIS_FOLDER" in (output / "serve.md").read_text()


# --- what no server takes ----------------------------------------------------------------------------

PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["a.q_proj"], "bias": "none", "init_lora_weights": True}


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"lora_bias": True},
     {"layer_replication": [[0, 4]]}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
     {"alora_invocation_tokens": [1]}, {"target_modules": r".*\.q_proj"}, {"target_modules": "all-linear"},
     {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}, {"target_parameters": ["experts"]},
     {"trainable_token_indices": [3]}],
)  # fmt: skip
def test_features_that_servers_lack_are_problems(target: str, changes: dict[str, Any]) -> None:
    assert adapter_problems(target, PLAIN) == []
    found = adapter_problems(target, {**PLAIN, **changes})
    assert len(found) == 1 and next(iter(changes)) in found[0]
    if target == "vllm" and not changes.keys() & {
        "target_modules", "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices",
    }:  # fmt: skip
        assert len(vllm_complaints({**PLAIN, **changes}, 512)) == 1  # vLLM says so too


def test_a_rank_above_what_vllm_serves_is_a_problem_there_only() -> None:
    assert "rank 1024 is above 512" in adapter_problems("vllm", {**PLAIN, "r": 1024})[0]
    assert vllm_complaints({**PLAIN, "r": 1024}, 512) == ["rank"]
    assert adapter_problems("sglang", {**PLAIN, "r": 1024}) == []


def test_modules_that_sglang_has_no_place_for_are_a_problem_there_only() -> None:
    strange = {**PLAIN, "target_modules": ["model.layers.1.mamba.in_proj"]}
    assert "in_proj" in adapter_problems("sglang", strange)[0]
    assert adapter_problems("vllm", strange) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("layer_replication", [[0, 2]]),
     ("init_lora_weights", "pissa"), ("init_lora_weights", "loftq")],
)  # fmt: skip
def test_refusals_come_before_anything_is_written(
    adapter: Path, tmp_path: Path, key: str, value: Any, base_folder: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / CONFIG).read_text())
    remade(copy, CONFIG, json.dumps({**config, key: value}))
    for target in ("peft", "vllm", "sglang"):
        with pytest.raises(ConfigError, match=key):
            export(ExportConfig(source=copy, output=tmp_path / "out", target=target, base=str(base_folder)))
    assert not (tmp_path / "out").exists()


def test_lora_on_the_vision_tower_goes_to_vllm_by_request_only(shipped, tmp_path: Path) -> None:
    modules = ["model.language_model.layers.1.mlp.up_proj", "model.visual.blocks.0.attn.proj"]
    with pytest.raises(ConfigError, match=r"model\.visual\.blocks\.0\.attn\.proj .*--allow-vision"):
        shipped("qwen2_5_vl", "vllm", target_modules=modules)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="sglang applies no LoRA"):
        shipped("qwen2_5_vl", "sglang", {"allow_vision": True}, name="second", target_modules=modules)
    output = shipped("qwen2_5_vl", "vllm", {"allow_vision": True}, name="third", target_modules=modules)
    # vllm/config/lora.py enable_tower_connector_lora
    assert "--enable-tower-connector-lora" in (output / "serve.md").read_text()
    mapped = set(vllm_modules(output, VLLM_MAPPERS["qwen2_5_vl"]["before"]).values())
    assert mapped == {"language_model.model.layers.1.mlp.up_proj", "visual.blocks.0.attn.proj"}


# --- patterns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"o_proj": 24}},
     {"use_rslora": True, "r": 8}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
     {"target_modules": r".*language_model\.layers\.[12]\.self_attn\.(q|o)_proj"},
     {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "language_model.layers"}],
)  # fmt: skip
def test_patterns_are_folded_exactly(
    target: str, settings: dict[str, Any], shipped, plain_logits, tmp_path: Path, tiny_base
) -> None:
    output = shipped("llava", target, **settings)
    wanted = plain_logits("llava", tmp_path / "plain")  # PEFT reads the patterns
    config = json.loads((output / CONFIG).read_text())
    assert adapter_problems(target, config) == [] and isinstance(config["target_modules"], list)
    assert {t.shape[0] for k, t in load_file(str(output / WEIGHTS)).items() if "lora_A" in k} == {config["r"]}
    today = migrate(MigrateConfig(adapter=output, output=tmp_path / "today", model=str(tiny_base("llava"))))
    assert relative_difference(plain_logits("llava", today), wanted) <= 1e-5
    assert relative_difference(wanted, plain_logits("llava")) > 1e-3


def test_scales_are_those_of_peft(plain_adapter, tiny_base) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForImageTextToText

    folder = plain_adapter(
        "llava", rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"o_proj": 24}, use_rslora=True
    )
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_base("llava")), folder)
    ours = scales(check_adapter(folder))
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            assert ours[name] == (module.r["default"], pytest.approx(module.scaling["default"]))
    assert sorted({s for _, s in ours.values()}) == pytest.approx([8 / 2, 8 / math.sqrt(2), 24 / 2])


def test_weights_of_another_rank_than_said_are_refused(plain_adapter) -> None:
    folder = plain_adapter("llava")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "r": 8, "use_rslora": True}))
    with pytest.raises(ConfigError, match="has rank 4 in the weights, 8 by its configuration"):
        folded(check_adapter(folder))


# --- the rest of the folder ----------------------------------------------------------------------------


def test_processor_and_template_are_the_bases_own_files(
    adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{# as the base has it #}")
    (base / "special_tokens_map.json").write_text("{}")
    output = export(ExportConfig(source=adapter, output=tmp_path / "out", target="vllm", base=str(base)))
    for name in ("chat_template.jinja", "special_tokens_map.json", "processor_config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes(), name


def test_a_base_that_does_not_fit_is_named(adapter: Path, tiny_base, tmp_path: Path) -> None:
    for family, said in (("qwen2_5_vl", "does not fit the base model"), ("llava", "does not fit")):
        with pytest.raises(VerificationError, match=said):
            export(
                ExportConfig(
                    source=adapter, output=tmp_path / "out", target="vllm", base=str(tiny_base(family))
                )
            )
    assert not (tmp_path / "out").exists()


def test_a_server_needs_the_base_and_peft_does_not(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = {**json.loads((copy / CONFIG).read_text()), "base_model_name_or_path": "someone/model"}
    remade(copy, CONFIG, json.dumps(config))
    with pytest.raises(ConfigError, match="--base someone/model"):
        export(ExportConfig(source=copy, output=tmp_path / "out", target="vllm"))
    output = export(ExportConfig(source=copy, output=tmp_path / "out"))
    assert not (output / "serve.md").exists()


def test_an_export_for_vllm_verifies_with_plain_peft(
    adapter: Path, base_folder: Path, tmp_path: Path, reload_here: None
) -> None:
    """Under the names of the base's files, which PEFT does not know: they are put back for the reload."""
    output = export(
        ExportConfig(source=adapter, output=tmp_path / "out", target="vllm", base=str(base_folder))
    )
    assert all("language_model" not in key for key in load_file(str(output / WEIGHTS)))
    checks = {c.name: c for c in verify(VerifyConfig(folder=output, base=str(base_folder), samples=1))}
    assert {"target", "plan", "base", "plain", "effect", "logits", "generation", "card"} <= set(checks)
    assert checks["target"].detail == "as vllm loads it"


# --- merged models and llama.cpp -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged16(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged16") / "m"
    return merge(
        MergeConfig(adapters=(str(adapter),), output=output, device="cpu", dtype="bfloat16", pairs=0)
    )


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang", "gguf"])
def test_a_merged_model_has_the_bases_names_and_files(
    target: str, merged16: Path, base_folder: Path, tmp_path: Path, reload_here: None
) -> None:
    output = export(
        ExportConfig(source=merged16, output=tmp_path / "out", target=target, base=str(base_folder))
    )
    names = set(load_file(str(output / "model.safetensors")))
    assert names == set(load_file(str(base_folder / "model.safetensors")))
    assert (output / "serve.md").exists() == (target != "peft")
    template = "chat_template.jinja"
    assert (output / template).read_bytes() == (base_folder / template).read_bytes()
    checks = {c.name for c in verify(VerifyConfig(folder=output, base=str(base_folder), samples=1))}
    assert {"base", "target", "merge", "logits", "generation", "card"} <= checks


def test_the_gguf_page_converts_text_and_pictures(merged16: Path, tmp_path: Path) -> None:
    output = export(ExportConfig(source=merged16, output=tmp_path / "out", target="gguf"))
    page = (output / "serve.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("python convert_hf_to_gguf.py ")]
    assert len(commands) == 2 and "--outtype bf16" in commands[0] and "--mmproj" in commands[1]
    # llama.cpp conversion/base.py get_model_architecture: the class name decides, of the text part if it has
    # one; conversion/__init__.py TEXT_MODEL_MAP and MMPROJ_MODEL_MAP hold it (at 00bdaa1). Weights: files
    # whose names start with "model" and end with ".safetensors" (ModelBase.get_model_part_names).
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert "architectures" not in config["text_config"] and config["dtype"] == "bfloat16"
    assert [p.name for p in output.glob("model*.safetensors")] == ["model.safetensors"]


def test_an_adapter_for_gguf_says_to_merge_first(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"merge it into its base first.*merge .*--dtype bfloat16"):
        export(ExportConfig(source=adapter, output=tmp_path / "out", target="gguf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [({"architectures": ["Qwen2_5_VLModel"], "dtype": "bfloat16"}, "Qwen2_5_VLModel"),
     ({"architectures": ["InternVLForConditionalGeneration"], "dtype": "bfloat16"}, "no text model"),
     ({"dtype": "bfloat16"}, "architecture None"),
     ({"architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "float32"}, "in float32"),
     ({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "float16",
       "text_config": {"architectures": ["Qwen2_5_VLTextModel"]}}, "Qwen2_5_VLTextModel"),
     ({"architectures": ["Qwen2VLForConditionalGeneration"], "quantization_config": {"a": 4}}, "quantized")],
)  # fmt: skip
def test_what_the_converter_cannot_read_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_merged("gguf", config, "config.json")


def test_smolvlm_is_converted_by_the_class_of_its_text_part() -> None:
    text = {"architectures": ["VLlama3ForCausalLM"]}
    config = {"architectures": ["SmolVLMForConditionalGeneration"], "text_config": text, "dtype": "bfloat16"}
    check_merged("gguf", config, "config.json")


def test_renamed_weights_are_found(merged16: Path, base_folder: Path, tmp_path: Path) -> None:
    """A transformers version that writes other names (5.5 did, transformers#45357)."""
    copy = Path(shutil.copytree(merged16, tmp_path / "copy"))
    tensors = load_file(str(copy / "model.safetensors"))
    turned = {k.replace("visual.", "model.language_model.visual."): v for k, v in tensors.items()}
    save_file(turned, str(copy / "model.safetensors"), metadata={"format": "pt"})
    remade(copy)
    with pytest.raises(VerificationError, match=r"model\.language_model\.visual\..*"):
        export(ExportConfig(source=copy, output=tmp_path / "out", target="vllm", base=str(base_folder)))


def test_torch_is_not_confused_by_padding(plain_adapter) -> None:
    """Folding to a larger rank adds zeros only."""
    folder = plain_adapter("llava", rank_pattern={"q_proj": 2})
    tensors, rank, alpha = folded(check_adapter(folder))
    key = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"
    a, b = tensors[key.format("A")], tensors[key.format("B")]
    assert rank == 4 and a.shape[0] == b.shape[1] == 4
    assert not bool(a[2:].any()) and not bool(b[:, 2:].any())
    stored = load_file(str(folder / WEIGHTS))
    wanted = stored[key.format("B")] @ stored[key.format("A")] * (8 / 2)
    torch.testing.assert_close(b @ a * (alpha / rank), wanted)
