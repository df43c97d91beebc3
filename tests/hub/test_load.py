"""Adapters from anywhere: what is refused before anything is loaded, and what is checked after."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.load import check_adapter, load_adapter
from vfl_train.models import VisionLanguageModel


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(str(path))), str(path))


def test_modules_and_layers_come_from_the_weights(adapter: Path) -> None:
    info = check_adapter(adapter)
    assert info.layers("model.language_model.layers") == [3, 4] and len(info.modules) == 14
    assert info.blocks == {"model.language_model.layers.3", "model.language_model.layers.4"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "Trap", "parent_library": "antigravity"}),
        ("megatron_config", {"x": 1}),
        ("modules_to_save", ["lm_head"]),
        ("eva_config", {"rho": 3.0}),
        ("bias", "all"),
        ("use_dora", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("peft_type", "PROMPT_TUNING"),
        ("r", 0),
        ("r", "8"),
    ],
)
def test_configurations_that_do_more_than_lora_are_refused(copy: Path, key: str, value: Any) -> None:
    change_config(copy, **{key: value})
    with pytest.raises(ConfigError):
        check_adapter(copy)


def test_nothing_is_imported_fetched_or_unpickled(
    copy: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A remote base, foreign code and a pickle beside the weights: loading touches none of them."""
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: tried.append(a))
    monkeypatch.setattr(torch, "load", lambda *a, **k: tried.append(a))
    change_config(copy, base_model_name_or_path="evil/base", revision="main")
    (copy / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    vlm = VisionLanguageModel.load(str(base_folder), device="cpu", adapter=str(copy))
    assert vlm.num_layers == 12 and not tried


def test_pickled_weights_alone_are_refused(copy: Path) -> None:
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        check_adapter(copy)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_unreadable_weights_are_refused(copy: Path, content: bytes) -> None:
    (copy / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="safetensors"):
        check_adapter(copy)


def test_weights_that_are_not_lora_are_refused(copy: Path) -> None:
    change_weights(copy, lambda state: {**state, "base_model.model.lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(ConfigError, match="lm_head"):
        check_adapter(copy)


def test_renamed_modules_are_an_error_and_not_the_base_model(copy: Path, base_folder: Path) -> None:
    change_weights(copy, lambda state: {k.replace("language_model.", ""): v for k, v in state.items()})
    vlm = VisionLanguageModel.load(str(base_folder), device="cpu")
    with pytest.raises(VerificationError, match="does not have"):
        load_adapter(vlm.model, copy)


def test_half_a_module_is_an_error(copy: Path, base_folder: Path) -> None:
    def drop_one(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in state.items() if "layers.3.mlp.up_proj.lora_B" not in k}

    change_weights(copy, drop_one)
    vlm = VisionLanguageModel.load(str(base_folder), device="cpu")
    with pytest.raises(VerificationError, match=r"layers\.3\.mlp\.up_proj\.lora_B"):
        load_adapter(vlm.model, copy)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        check_adapter(tmp_path / "nowhere")
