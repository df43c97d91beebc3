"""Merging: exact arithmetic, refusals, and a folder that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vfl_train.config import MergeConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.load import check_adapter
from vfl_train.hub.merge import base_of, merge, unique_names, weight_names

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def merged(adapter: Path, other_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "m"
    return merge(MergeConfig(adapters=(str(adapter), str(other_adapter)), output=output, device="cpu"))


def test_the_weights_are_base_plus_updates(
    merged: Path, base_folder: Path, adapter: Path, other_adapter: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    expected = AutoModelForImageTextToText.from_pretrained(base_folder).state_dict()
    for folder in (adapter, other_adapter):
        state = load_file(str(folder / "adapter_model.safetensors"))
        for key in [k for k in state if "lora_A" in k]:
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            update = state[key.replace("lora_A", "lora_B")] @ state[key] * 2  # alpha / r
            expected[f"{module}.weight"] = expected[f"{module}.weight"] + update
    found = AutoModelForImageTextToText.from_pretrained(merged).state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_record_states_layers_and_the_difference(merged: Path) -> None:
    record = json.loads((merged / "merge.json").read_text())
    assert [a["layers"] for a in record["adapters"]] == [[3, 4], [10]]
    assert record["difference"]["value"] <= record["difference"]["bound"] == 1e-5
    assert record["effect"]["value"] > 1e-3
    assert record["dtype"] == "float32"


def test_the_folder_is_plain_transformers(merged: Path, base_folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not [n for n, _ in model.named_modules() if "lora" in n]
    assert AutoProcessor.from_pretrained(merged).chat_template
    assert (merged / "generation_config.json").is_file()
    assert weight_names(merged) == weight_names(base_folder)
    head = yaml.safe_load((merged / "README.md").read_text().split("---\n")[1])
    assert (head["base_model_relation"], head["library_name"]) == ("finetune", "transformers")


def test_no_path_of_the_machine_is_left(merged: Path, base_folder: Path, adapter: Path) -> None:
    for path in merged.iterdir():
        content = path.read_bytes()
        assert str(base_folder).encode() not in content, path.name
        assert str(adapter.parent).encode() not in content, path.name


def test_overlapping_adapters_are_refused_unless_asked_for(
    adapter: Path, make_adapter, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", "4-5", seed=2)
    pair = (str(adapter), str(other))
    with pytest.raises(ConfigError, match="both change layers 4"):
        merge(MergeConfig(adapters=pair, output=tmp_path / "m", device="cpu"))
    assert not (tmp_path / "m").exists()
    merge(MergeConfig(adapters=pair, output=tmp_path / "m", device="cpu", allow_overlap=True))
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_sixteen_bit_merges_are_measured_too(adapter: Path, tmp_path: Path) -> None:
    output = merge(
        MergeConfig(adapters=(str(adapter),), output=tmp_path / "m", device="cpu", dtype="bfloat16")
    )
    record = json.loads((output / "merge.json").read_text())
    assert 0 < record["difference"]["value"] <= record["difference"]["bound"] == 3e-2
    assert {t.dtype for t in load_file(str(output / "model.safetensors")).values()} == {torch.bfloat16}


def test_a_merge_that_moves_the_logits_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("vfl_train.hub.merge", fromlist=["BOUNDS"]).BOUNDS, "float32", -1.0)
    with pytest.raises(VerificationError, match="answers differently"):
        merge(MergeConfig(adapters=(str(adapter),), output=tmp_path / "m", device="cpu"))
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_a_base_on_the_hub_is_only_fetched_when_given(adapter: Path) -> None:
    info = check_adapter(adapter)
    remote = type(info)(info.folder, "someone/model", None, info.modules, info.layers, info.config)
    with pytest.raises(ConfigError, match="--model someone/model"):
        base_of([remote], None)
    assert base_of([remote], "someone/model") == ("someone/model", None)
    with pytest.raises(ConfigError, match="different base models"):
        base_of([remote, info], None)


def test_names_are_unique(adapter: Path, other_adapter: Path) -> None:
    infos = [check_adapter(adapter), check_adapter(other_adapter), check_adapter(adapter)]
    assert unique_names(infos) == ["a", "b.1", "a-2"]


def test_a_finished_merge_is_not_repeated(merged: Path, adapter: Path, other_adapter: Path) -> None:
    before = (merged / "model.safetensors").stat().st_mtime_ns
    merge(MergeConfig(adapters=(str(adapter), str(other_adapter)), output=merged, device="cpu"))
    assert (merged / "model.safetensors").stat().st_mtime_ns == before


def test_a_merged_phantom_still_knows_its_world(merged: Path) -> None:
    """So that its probes are drawn from there."""
    from vfl_train.models import VisionLanguageModel

    assert VisionLanguageModel.load(str(merged)).world == "phantom"
