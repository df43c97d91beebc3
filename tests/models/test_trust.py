"""A model folder from anyone runs nothing: no import, no file, no socket; the refusal names file and key."""

from __future__ import annotations

import json
import pickle  # allow: makes the bait that must never be read
import shutil
import sys
from pathlib import Path

import pytest

from vfl_train.errors import ConfigError
from vfl_train.models import VisionLanguageModel, load_processor

BAIT = "vfl_bait_module"
KERNEL = "kernels-community/flash-attn3"
CODE = {"AutoConfig": f"{BAIT}.Config", "AutoModel": f"{BAIT}.Model"}

_WATCHED: list[tuple[str, str]] | None = None


def _watch(event: str, args: tuple) -> None:
    if _WATCHED is not None and event in (
        "socket.connect",
        "socket.getaddrinfo",
        "import",
        "subprocess.Popen",
    ):
        _WATCHED.append((event, str(args)))


sys.addaudithook(_watch)  # hooks cannot be removed; this one sleeps while _WATCHED is None


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(folder_of, tmp_path) -> Path:
    """A copy of a good model, with code lying beside it that leaves a file when it is imported."""
    copy = tmp_path / "model"
    shutil.copytree(folder_of("llava"), copy)
    (copy / f"{BAIT}.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n", encoding="utf-8")
    return copy


def refused(folder: Path, load=VisionLanguageModel.load) -> str:
    """The refusal of `folder`; nothing was touched, imported or connected to."""
    global _WATCHED
    _WATCHED = []
    try:
        with pytest.raises(ConfigError) as e:
            load(str(folder))
        events = _WATCHED
    finally:
        _WATCHED = None
    assert not (folder.parent / "touched").exists()
    assert not [e for e in events if e[0] != "import" or BAIT in e[1] or "kernels" in e[1]]
    assert BAIT not in sys.modules
    assert e.value.exit_code == 2 and len(str(e.value).splitlines()) == 1
    return str(e.value)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_the_untouched_copy_loads(folder):
    VisionLanguageModel.load(str(folder), device="cpu")


CHANGES = {
    "auto_map": lambda c: c.update(auto_map=CODE),
    "nested auto_map": lambda c: c["text_config"].update(auto_map=CODE),
    "auto_map in a list": lambda c: c.update(parts=[{"auto_map": CODE}]),
    "_attn_implementation_internal": lambda c: c.update(_attn_implementation_internal=KERNEL),
    "nested _attn_implementation_internal": lambda c: c["vision_config"].update(
        _attn_implementation_internal=KERNEL
    ),
    "_attn_implementation": lambda c: c["text_config"].update(_attn_implementation=KERNEL),
    "_experts_implementation_internal": lambda c: c.update(_experts_implementation_internal=KERNEL),
}


@pytest.mark.parametrize("what", CHANGES)
def test_config_that_names_code_or_kernels(folder, what):
    edit(folder / "config.json", CHANGES[what])
    message = refused(folder)
    assert str(folder / "config.json") in message and what.split()[1 if "nested" in what else 0] in message


@pytest.mark.parametrize(
    "name",
    [
        "processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
        "video_preprocessor_config.json", "generation_config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [VisionLanguageModel.load, load_processor], ids=["model", "processor"])
def test_other_files_that_name_code(folder, name, load):
    edit(folder / name, lambda c: c.update(auto_map={"AutoProcessor": f"{BAIT}.Processor"}))
    message = refused(folder, load)
    assert str(folder / name) in message and "auto_map" in message


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "touched")))
    assert "no safetensors weights" in refused(folder)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"lm_head.weight": "pytorch_model.bin"}},
        {"weight_map": {"lm_head.weight": "../model.safetensors"}},
        {"weight_map": {"lm_head.weight": "gone.safetensors"}},
        {"weight_map": {}},
        {"weight_map": {"lm_head.weight": 3}},
        [],
    ],
    ids=str,
)
def test_an_index_leads_to_no_other_weights(folder, index):
    """transformers unpickles a shard that is not called *.safetensors."""
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "touched")))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, **index} if index else index), encoding="utf-8")
    assert str(path) in refused(folder)


def test_pickled_weights_are_not_read_where_others_are_missing(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "touched")))
    refused(folder)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_cut_weights_are_refused(folder, size):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    assert str(folder) in refused(folder)


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("keep_config", [True, False], ids=["with its own config", "adapter only"])
def test_an_adapter_does_not_bring_its_base_model(folder, keep_config):
    base = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}
    (folder / "adapter_config.json").write_text(json.dumps(base), encoding="utf-8")
    if not keep_config:
        (folder / "config.json").unlink()
    assert "adapter_config.json" in refused(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_configuration_that_is_no_json(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json is not valid JSON" in refused(folder)
