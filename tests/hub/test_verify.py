"""Verification: passes on what was written, names the first thing that was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import remade
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


def read(folder: Path) -> dict:
    return json.loads((folder / "verification.json").read_text())


def test_an_adapter_passes_and_no_listed_file_changes(copy: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    checks = {check.name: check for check in verify(VerifyConfig(folder=copy, samples=2))}
    assert {"manifest", "plan", "reload_keys", "adapter_keys", "effect", "logits"} <= set(checks)
    assert {"target", "base", "card", "plain", "generation"} <= set(checks)
    assert checks["plain"].detail == "transformers and PEFT alone load it"  # in a process of its own
    assert checks["generation"].detail.startswith("2 of 2 answers are the same")
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
    merge(MergeConfig(adapters=(str(adapter), str(other_adapter)), output=output, device="cpu", pairs=0))
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


@pytest.mark.parametrize("listed", [False, True])
def test_a_pickle_is_refused_in_the_manifest_too(copy: Path, listed: bool) -> None:
    (copy / "optimizer.pt").write_bytes(b"x")
    if listed:
        value = json.loads((copy / "manifest.json").read_text())
        value["files"]["optimizer.pt"] = {"sha256": file_sha256(copy / "optimizer.pt"), "bytes": 1}
        (copy / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(VerificationError, match=r"optimizer\.pt .* may hold code"):
        verify(VerifyConfig(folder=copy))


def test_a_file_cut_short_is_named_with_its_size(copy: Path) -> None:
    path = copy / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    said = rf"adapter_model\.safetensors .* is cut short: {len(content) // 2} of {len(content)} bytes"
    with pytest.raises(VerificationError, match=said):
        verify(VerifyConfig(folder=copy))


def test_weights_cut_short_before_the_manifest_was_made_are_named(copy: Path) -> None:
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    remade(copy)
    with pytest.raises(VerificationError, match=r"adapter_model\.safetensors is not a readable"):
        verify(VerifyConfig(folder=copy))


def test_a_reload_that_imports_this_package_is_found(
    copy: Path, reload_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vfl_train.hub import verify as module

    clean = module.reload_in_fresh_process
    monkeypatch.setattr(
        module, "reload_in_fresh_process", lambda *a: {**clean(*a), "ours": ["vfl_train.hub"]}
    )
    with pytest.raises(VerificationError, match=r"plain: vfl_train\.hub was imported"):
        verify(VerifyConfig(folder=copy, samples=1))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("adapter\n", "finetune\n", "base_model_relation is 'finetune'"),
     ("image-text-to-text", "text-generation", "pipeline_tag is 'text-generation'"),
     ("library_name: peft", "library_name: transformers", "library_name is 'transformers'"),
     ("library_name", "base_model: /srv/models/base0\nlibrary_name", "no name of a model on the Hub"),
     ("tags:", "tags: [", "metadata that the Hub refuses"),
     ("tags:", "model-index:\n- name: x\n  results: 3\ntags:", "metadata that the Hub refuses"),
     ("# LoRA", "see /home/me/notes\n# LoRA", "a path of a machine")],
)  # fmt: skip
def test_a_wrong_card_is_found(copy: Path, old: str, new: str, said: str) -> None:
    path = copy / "README.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    remade(copy)
    with pytest.raises(VerificationError, match="card") as raised:
        verify(VerifyConfig(folder=copy))
    assert said in raised.value.message


def test_answers_that_differ_are_found_and_near_ties_are_not(copy: Path, reload_here: None) -> None:
    """`written` of the reference is changed as if another model had written it."""
    path = copy / "logits_reference.json"
    value = json.loads(path.read_text())
    token = value["prompts"][0]["written"][3]
    value["prompts"][0]["written"][3] = (token + 1) % 70
    path.write_text(json.dumps(value))
    remade(copy)
    with pytest.raises(VerificationError, match="generation: 0 of 1 answers are the same"):
        verify(VerifyConfig(folder=copy, samples=1))


def test_a_base_of_another_size_is_named(copy: Path, tmp_path: Path) -> None:
    from tiny_models import qwen2_5_vl

    model, processor = qwen2_5_vl()
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match=r"base: copy does not fit the base model: model\.lang"):
        verify(VerifyConfig(folder=copy, base=str(tmp_path / "other")))


def test_a_merged_model_is_compared_with_the_names_of_its_base(
    adapter: Path, tmp_path: Path, tiny_base, reload_here: None
) -> None:
    output = tmp_path / "m"
    merge(MergeConfig(adapters=(str(adapter),), output=output, device="cpu", pairs=0))
    with pytest.raises(VerificationError, match=r"base: .* under names that the base model's files do"):
        verify(VerifyConfig(folder=output, base=str(tiny_base("llava")), samples=1))


def test_an_adapter_of_a_4_bit_base_is_reloaded_on_one(
    copy: Path, base_folder: Path, reload_here: None
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    from vfl_train.hub.load import load_adapter
    from vfl_train.hub.samples import make_reference

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    base = AutoModelForImageTextToText.from_pretrained(
        base_folder, quantization_config=nf4, dtype=torch.float32
    )
    reference = make_reference(load_adapter(base, copy), AutoProcessor.from_pretrained(base_folder))
    (copy / "logits_reference.json").write_text(json.dumps(reference))
    remade(copy)
    checks = {c.name: c for c in verify(VerifyConfig(folder=copy, samples=1))}
    assert checks["logits"].value <= checks["logits"].bound


def test_weights_that_do_nothing_or_differ_from_training_are_found(copy: Path, reload_here: None) -> None:
    path = copy / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(str(path)).items()}, str(path))
    remade(copy)
    with pytest.raises(VerificationError, match="effect"):
        verify(VerifyConfig(folder=copy, samples=1))
    failed = {check["name"] for check in read(copy)["checks"] if not check["passed"]}
    assert failed >= {"effect", "logits"} and failed <= {"effect", "logits", "generation"}


def test_another_plan_than_the_weights_is_found(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    plan["module_names"].pop()
    (copy / "plan.json").write_text(json.dumps(plan))
    remade(copy)
    with pytest.raises(VerificationError, match="plan"):
        verify(VerifyConfig(folder=copy))


def test_a_pattern_in_the_configuration_is_found(copy: Path) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": r".*q_proj"}))
    remade(copy)
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


def test_into_a_folder_of_others_nothing_is_written(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    before = {p.name for p in copy.iterdir()}
    with pytest.raises(VerificationError, match=r"has no manifest\.json") as raised:
        verify(VerifyConfig(folder=copy))
    assert "vfl-train migrate" in raised.value.fix
    assert {p.name for p in copy.iterdir()} == before


@pytest.mark.parametrize("name", ["../x", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(copy: Path, name: str) -> None:
    (copy / "manifest.json").write_text(json.dumps({"files": {name: {"sha256": "0"}}}))
    with pytest.raises(VerificationError, match="outside"):
        verify_manifest(copy)
