"""Verification: passes on what was written, names the first thing that was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vfl_train.config import MergeConfig, VerifyConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.manifest import verify_manifest
from vfl_train.hub.merge import merge
from vfl_train.hub.verify import verify
from vfl_train.runs import file_sha256


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def remake_manifest(folder: Path) -> None:
    """As if the folder had been written this way."""
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    for name in value["files"]:
        value["files"][name]["sha256"] = file_sha256(folder / name)
    path.write_text(json.dumps(value))


def read(folder: Path) -> dict:
    return json.loads((folder / "verification.json").read_text())


def test_an_adapter_passes_and_no_listed_file_changes(copy: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    checks = {check.name: check for check in verify(VerifyConfig(folder=copy, samples=2))}
    assert {"manifest", "plan", "reload_keys", "adapter_keys", "effect", "logits"} <= set(checks)
    assert checks["effect"].value > checks["effect"].bound
    assert checks["logits"].value <= checks["logits"].bound == 1e-5
    after = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    assert after.pop("verification.json") and after == before
    written = read(copy)
    assert written["passed"] is True
    assert set(written["checks"][0]) == {"name", "passed", "detail", "value", "bound"}
    assert verify_manifest(copy) > 8  # verification.json does not break the manifest


def test_a_merged_model_passes_without_its_adapters(
    adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "m"
    merge(MergeConfig(adapters=(str(adapter), str(other_adapter)), output=output, device="cpu"))
    checks = {check.name: check for check in verify(VerifyConfig(folder=output))}
    assert checks["logits"].value <= 1e-5
    assert {"generation_config", "merge", "processor_files", "reload_keys"} <= set(checks)


def test_one_flipped_bit_is_named(copy: Path) -> None:
    path = copy / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"adapter_model\.safetensors .* changed"):
        verify(VerifyConfig(folder=copy))
    assert read(copy)["passed"] is False


@pytest.mark.parametrize("name", ["tokenizer.json", "plan.json", "chat_template.jinja"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(VerificationError, match=name):
        verify(VerifyConfig(folder=copy))


def test_a_pickle_beside_the_files_is_named(copy: Path) -> None:
    (copy / "training_args.bin").write_bytes(b"x")
    with pytest.raises(VerificationError, match=r"training_args\.bin"):
        verify(VerifyConfig(folder=copy))


def test_weights_that_do_nothing_or_differ_from_training_are_found(copy: Path, reload_here: None) -> None:
    path = copy / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(str(path)).items()}, str(path))
    remake_manifest(copy)
    with pytest.raises(VerificationError, match="effect"):
        verify(VerifyConfig(folder=copy, samples=1))
    failed = {check["name"] for check in read(copy)["checks"] if not check["passed"]}
    assert failed == {"effect", "logits"}


def test_another_plan_than_the_weights_is_found(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    plan["module_names"].pop()
    (copy / "plan.json").write_text(json.dumps(plan))
    remake_manifest(copy)
    with pytest.raises(VerificationError, match="plan"):
        verify(VerifyConfig(folder=copy))


def test_a_pattern_in_the_configuration_is_found(copy: Path) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": r".*q_proj"}))
    remake_manifest(copy)
    with pytest.raises(VerificationError, match="target_modules"):
        verify(VerifyConfig(folder=copy))


def test_the_base_can_be_given_and_a_wrong_one_fails(copy: Path, tmp_path: Path, reload_here: None) -> None:
    from vfl_train.phantom.architecture import build_model, build_processor

    processor = build_processor()
    build_model(processor, seed=7).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match="logits"):
        verify(VerifyConfig(folder=copy, base=str(tmp_path / "other"), samples=1))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        verify(VerifyConfig(folder=tmp_path / "none"))
    with pytest.raises(ConfigError, match="neither an adapter nor a model"):
        verify(VerifyConfig(folder=tmp_path))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(copy: Path, name: str) -> None:
    (copy / "manifest.json").write_text(json.dumps({"files": {name: {"sha256": "0"}}}))
    with pytest.raises(VerificationError, match="outside"):
        verify_manifest(copy)
