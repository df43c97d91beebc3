"""Export: the allow-list, paths and tokens, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vfl_train.config import ExportConfig, MergeConfig, VerifyConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.export import export
from vfl_train.hub.merge import merge
from vfl_train.hub.privacy import find_secret, public_name, public_values
from vfl_train.hub.verify import verify
from vfl_train.runs import file_sha256


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def add_to_manifest(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    value = json.loads((folder / "manifest.json").read_text())
    value["files"][name] = {"sha256": file_sha256(folder / name), "bytes": len(text)}
    (folder / "manifest.json").write_text(json.dumps(value))


def test_an_adapter_is_copied_by_allow_list(
    copy: Path, tmp_path: Path, base_folder: Path, reload_here: None
) -> None:
    add_to_manifest(copy, "train_log.jsonl", "{}")
    add_to_manifest(copy, "notes.txt", "private")
    output = export(ExportConfig(source=copy, output=tmp_path / "out"))
    names = {p.name for p in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "plan.json"} <= names
    assert not names & {"notes.txt", "train_log.jsonl", "verification.json"}
    for path in output.iterdir():
        assert str(base_folder.parent).encode() not in path.read_bytes(), path.name
    verify(VerifyConfig(folder=output, base=str(base_folder), samples=1))


def test_a_merged_model_is_copied_and_verifies(adapter: Path, tmp_path: Path, reload_here: None) -> None:
    merged = merge(MergeConfig(adapters=(str(adapter),), output=tmp_path / "m", device="cpu", pairs=0))
    output = export(ExportConfig(source=merged, output=tmp_path / "out"))
    assert (output / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    verify(VerifyConfig(folder=output, samples=1))


@pytest.mark.parametrize(
    "secret", ["hf_" + "a" * 34, "sk-" + "b" * 40, "/home/someone/data", "C:\\Users\\x\\y"]
)
def test_a_secret_stops_the_export_and_names_the_file(copy: Path, tmp_path: Path, secret: str) -> None:
    add_to_manifest(copy, "train_config.yaml", f"lora:\n  data: {secret}\n")
    with pytest.raises(ConfigError, match=r"train_config\.yaml") as raised:
        export(ExportConfig(source=copy, output=tmp_path / "out"))
    assert "aaaaaaaaaa" not in raised.value.message
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").rename(copy / "scorecard.json")
    with pytest.raises(ConfigError, match="no adapter, merged model, profile or selection"):
        export(ExportConfig(source=copy, output=tmp_path / "out"))


def test_a_base_that_is_a_folder_is_no_model_of_the_hub_on_the_card(adapter: Path) -> None:
    """A stranger's model may have the folder's name there."""
    text = (adapter / "README.md").read_text()
    assert "\nbase_model_relation: adapter" in text and "\nbase_model:" not in text


def test_the_card_says_what_else_was_adapted(copy: Path, tmp_path: Path) -> None:
    assert "the vision tower and connector included, is as" in (copy / "README.md").read_text()
    plan = json.loads((copy / "plan.json").read_text())
    add_to_manifest(copy, "plan.json", json.dumps({**plan, "part_modules": {"connector": 2, "vision": 12}}))
    text = (export(ExportConfig(source=copy, output=tmp_path / "out")) / "README.md").read_text()
    assert "and on the connector and vision tower; everything else,\nis as in the base model" in text
    assert "--enable-tower-connector-lora" in text and "sglang" not in text


def test_a_changed_source_is_refused(copy: Path, tmp_path: Path) -> None:
    with (copy / "README.md").open("a") as f:
        f.write("x")
    with pytest.raises(VerificationError, match=r"README\.md"):
        export(ExportConfig(source=copy, output=tmp_path / "out"))


def test_paths_are_cut_to_their_last_part() -> None:
    assert public_name("/home/u/models/m") == "m"
    assert public_name("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert public_name("phantom") == "phantom"
    assert public_values({"a": [Path("/x/y"), 1, None, True], "b": {"c": "/z"}}) == {
        "a": ["y", 1, None, True], "b": {"c": "z"},
    }  # fmt: skip
    assert find_secret("nothing here, not even half a hf_token") is None
