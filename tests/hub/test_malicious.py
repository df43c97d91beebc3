"""Adapter folders from anyone (R16): what lies in them opens no file elsewhere, imports nothing, connects to
nothing, and is refused with the reason. Model folders: tests/models/test_trust.py."""

from __future__ import annotations

import json
import pickle  # allow: makes the bait that must never be read
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfl_train.config import ExportConfig, MergeConfig, VerifyConfig
from vfl_train.errors import VflError
from vfl_train.hub.export import export
from vfl_train.hub.merge import merge
from vfl_train.hub.verify import verify
from vfl_train.models import VisionLanguageModel
from vfl_train.runs import file_sha256

BAIT = "vfl_adapter_bait"
_WATCHED: list[tuple[str, str]] | None = None


def _watch(event: str, args: tuple) -> None:
    if _WATCHED is not None and event in (
        "socket.connect", "socket.getaddrinfo", "import", "subprocess.Popen", "pickle.find_class",
    ):  # fmt: skip
        _WATCHED.append((event, str(args)))


sys.addaudithook(_watch)  # hooks cannot be removed; this one sleeps while _WATCHED is None


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def trap(adapter: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter with code beside it that leaves a file when it is imported."""
    copy = Path(shutil.copytree(adapter, tmp_path / "trap"))
    (copy / f"{BAIT}.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    return copy


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    manifest = folder / "manifest.json"
    value = json.loads(manifest.read_text())
    value["files"][path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(value))


def uses(folder: Path, base: Path, output: Path) -> dict[str, Callable[[], object]]:
    """Every command that takes an adapter folder."""
    return {
        "load": lambda: VisionLanguageModel.load(str(base), device="cpu", adapter=str(folder)),
        "export": lambda: export(ExportConfig(source=folder, output=output / "e")),
        "merge": lambda: merge(
            MergeConfig(adapters=(str(folder),), output=output / "m", device="cpu", pairs=0)
        ),
        "verify": lambda: verify(VerifyConfig(folder=folder, samples=1)),
    }  # fmt: skip


def watched(call: Callable[[], object], touched: Path) -> str:
    """What `call` refuses with, empty if it does not; nothing foreign may have happened on the way."""
    global _WATCHED
    _WATCHED, said = [], ""
    try:
        call()
    except VflError as e:
        said = str(e)
        assert "\n" not in said
    finally:
        events, _WATCHED = _WATCHED, None
    assert not touched.exists()
    assert not [e for e in events if e[0] != "import" or BAIT in e[1] or "antigravity" in e[1]]
    return said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"auto_mapping": {"base_model_class": "Trap", "parent_library": BAIT}}, "auto_mapping"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}}, "auto_mapping"),
        ({"megatron_core": BAIT, "megatron_config": {"a": 1}}, "megatron"),
        ({"lora_ga_config": {"x": 1}}, "lora_ga_config"),
    ],
)  # fmt: skip
def test_code_and_packages_named_in_the_configuration(
    trap: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict, said: str
) -> None:
    monkeypatch.syspath_prepend(str(trap))
    change_config(trap, **values)
    for name, call in uses(trap, base_folder, tmp_path).items():
        assert said in watched(call, tmp_path / "touched"), name


def test_a_remote_base_is_named_and_not_fetched(trap: Path, base_folder: Path, tmp_path: Path) -> None:
    change_config(trap, base_model_name_or_path="evil/base", revision="main")
    calls = uses(trap, base_folder, tmp_path)
    assert watched(calls["load"], tmp_path / "touched") == ""  # on the base that the user gave
    for name in ("merge", "verify"):
        assert "evil/base" in watched(calls[name], tmp_path / "touched"), name
    assert watched(calls["export"], tmp_path / "touched") == ""  # copied as it is, nothing asked of anyone


def test_pickles_are_never_opened_and_not_passed_on(trap: Path, base_folder: Path, tmp_path: Path) -> None:
    names = ["adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin"]
    for name in names:
        (trap / name).write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    calls = uses(trap, base_folder, tmp_path)
    assert watched(calls["load"], tmp_path / "touched") == ""
    for name in names:
        for command in ("export", "merge", "verify"):
            assert name in watched(calls[command], tmp_path / "touched"), command
        (trap / name).unlink()
