"""Migration: names of before transformers 4.52 to today's and back, on real families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vfl_train.cli import main
from vfl_train.config import MigrateConfig, VerifyConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.load import check_adapter
from vfl_train.hub.migrate import migrate
from vfl_train.hub.samples import relative_difference
from vfl_train.hub.verify import verify

PREFIX = "base_model.model."
# As transformers 4.51 named the modules: (today, then), written by hand, not taken from transformers' tables.
OLD = {
    "qwen2_5_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "llava": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ),
    "gemma3": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ),
}
TOWER = {
    "qwen2_5_vl": "model.visual.blocks.1.attn.proj",
    "llava": "model.vision_tower.encoder.layers.1.self_attn.q_proj",
    "gemma3": "model.vision_tower.encoder.layers.1.self_attn.q_proj",
}


def as_then(family: str, name: str) -> str:
    for today, then in OLD[family]:
        if name.startswith(today):
            return then + name.removeprefix(today)
    return name


def age(folder: Path, rename: Callable[[str], str]) -> None:
    """As if the adapter had been made with the older names."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(str(weights))
    save_file({PREFIX + rename(k.removeprefix(PREFIX)): v for k, v in tensors.items()}, str(weights))
    value = json.loads(config.read_text())
    value["target_modules"] = [rename(name) for name in value["target_modules"]]
    config.write_text(json.dumps(value))


@pytest.mark.parametrize("family", OLD)
def test_an_old_adapter_works_again(
    family: str, plain_adapter, plain_logits, tiny_base, tmp_path: Path
) -> None:
    modules = [f"model.language_model.layers.{k}.mlp.up_proj" for k in (0, 3)]
    folder = plain_adapter(family, target_modules=[*modules, TOWER[family]])
    wanted = plain_logits(family, folder)
    before = load_file(str(folder / "adapter_model.safetensors"))
    age(folder, lambda name: as_then(family, name))
    assert check_adapter(folder).modules == {as_then(family, m) for m in [*modules, TOWER[family]]}

    output = migrate(MigrateConfig(adapter=folder, output=tmp_path / "new", model=str(tiny_base(family))))
    after = load_file(str(output / "adapter_model.safetensors"))
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted([*modules, TOWER[family]])
    found = plain_logits(family, output)
    assert relative_difference(found, wanted) <= 1e-6
    assert relative_difference(found, plain_logits(family)) > 1e-3  # it does something
    record = json.loads((output / "migration.json").read_text())
    assert len(record["renamed"]) == 3 and record["to"] == "current"

    back = migrate(
        MigrateConfig(adapter=output, output=tmp_path / "old", to="legacy", model=str(tiny_base(family)))
    )
    assert (
        load_file(str(back / "adapter_model.safetensors")).keys()
        == load_file(str(folder / "adapter_model.safetensors")).keys()
    )


def test_without_migration_an_old_qwen_adapter_is_the_base_model(plain_adapter, plain_logits) -> None:
    """Why this command is there: plain PEFT warns and goes on (peft 0.21.2, transformers 5.23.0)."""
    folder = plain_adapter("qwen2_5_vl", target_modules=["q_proj"])
    age(folder, lambda name: as_then("qwen2_5_vl", name))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        found = plain_logits("qwen2_5_vl", folder)
    assert relative_difference(found, plain_logits("qwen2_5_vl")) == 0


def test_the_result_is_a_folder_that_verify_takes(
    plain_adapter, tiny_base, tmp_path: Path, reload_here: None
) -> None:
    folder = plain_adapter("qwen2_5_vl")
    age(folder, lambda name: as_then("qwen2_5_vl", name))
    base = str(tiny_base("qwen2_5_vl"))
    output = migrate(MigrateConfig(adapter=folder, output=tmp_path / "new", model=base))
    with pytest.raises(VerificationError, match="processor_files"):  # plain PEFT saved none
        verify(VerifyConfig(folder=output, base=base, samples=1))


def test_nothing_to_do_is_said_and_the_adapter_comes_in(
    plain_adapter, tiny_base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plain_adapter("llava")
    with caplog.at_level("WARNING"):
        output = migrate(
            MigrateConfig(adapter=folder, output=tmp_path / "new", model=str(tiny_base("llava")))
        )
    assert "nothing to migrate, its 4 modules have the current names already" in caplog.text
    assert (output / "manifest.json").is_file()


def test_unknown_names_are_named(plain_adapter, tiny_base, tmp_path: Path) -> None:
    folder = plain_adapter("llava")
    age(folder, lambda name: name.replace("model.language_model.layers.2", "decoder.block.2"))
    with pytest.raises(ConfigError, match=r"decoder\.block\.2\.self_attn.*\(2 of 4 modules are unknown\)"):
        migrate(MigrateConfig(adapter=folder, output=tmp_path / "new", model=str(tiny_base("llava"))))
    assert not (tmp_path / "new").exists()


def test_two_names_of_one_module_are_refused(plain_adapter, tiny_base, tmp_path: Path) -> None:
    folder = plain_adapter("llava")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(str(path))
    aged = {PREFIX + as_then("llava", k.removeprefix(PREFIX)): v.clone() for k, v in tensors.items()}
    save_file({**tensors, **aged}, str(path))
    with pytest.raises(ConfigError, match="under two names"):
        migrate(MigrateConfig(adapter=folder, output=tmp_path / "new", model=str(tiny_base("llava"))))


def test_another_base_is_named(plain_adapter, base_folder: Path, tmp_path: Path) -> None:
    """The phantom is a Qwen2.5-VL too, of other sizes."""
    folder = plain_adapter("qwen2_5_vl")
    age(folder, lambda name: as_then("qwen2_5_vl", name))
    with pytest.raises(VerificationError, match=r"does not fit the base model: .* maps 128 to 128 there, 64"):
        migrate(MigrateConfig(adapter=folder, output=tmp_path / "new", model=str(base_folder)))


def test_an_adapter_that_does_nothing_is_refused(plain_adapter, tiny_base, tmp_path: Path) -> None:
    folder = plain_adapter("llava")
    path = folder / "adapter_model.safetensors"
    save_file({k: v * (".lora_A." in k) for k, v in load_file(str(path)).items()}, str(path))
    with pytest.raises(VerificationError, match="does nothing"):
        migrate(MigrateConfig(adapter=folder, output=tmp_path / "new", model=str(tiny_base("llava"))))


def test_the_command_needs_the_base_by_contract(plain_adapter, tmp_path: Path) -> None:
    from click.testing import CliRunner

    folder = plain_adapter("llava")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/else"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(main, ["migrate", str(folder), "--output", str(tmp_path / "new")])
    assert result.exit_code == 2 and "--model someone/else" in result.stderr
    assert len(result.stderr.splitlines()) == 1
