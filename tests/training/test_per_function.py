"""One adapter a function: its own layers, its own rows, its own folder, resumed one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from selections import write_selection

from vfl_train.config import LoraConfig
from vfl_train.errors import ConfigError, DataError
from vfl_train.runs import is_done
from vfl_train.schemas import FunctionProfile, ModelInfo, Profile
from vfl_train.training import per_function, run
from vfl_train.training.run import train_lora

BUCKETS = (["ocr"] * 3 + ["count"] * 2 + ["language"]) * 4
LAYERS = {"ocr": [10], "count": [5, 6], "emotion": [6]}


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    text = json.loads((base_folder / "config.json").read_text())["text_config"]
    flat = [0.0] * 12
    functions = {
        name: FunctionProfile("ok", 50, 50, flat, flat, [[0.0, 0.1]] * 12, {}, k[0], k, k, False)
        for name, k in LAYERS.items()
    }
    model = ModelInfo("base", None, "qwen2_5_vl", 12, text["hidden_size"])
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    value = Profile(model, "swap", "text", "reference", "float32", 0, {}, {}, functions).to_json()
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def make(
    make_config: Callable[..., LoraConfig], profile_file: Path, data_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., LoraConfig]:  # fmt: skip
    folder = tmp_path_factory.mktemp("selected") / "select"
    selected = write_selection(folder, data_file, BUCKETS, range(1, 24))

    def config(output: Path, **changes: object) -> LoraConfig:
        settings = {
            "data": str(selected), "image_root": data_file.parent, "layers": None, "max_steps": 1,
            "functions": ("ocr", "count"), "profile": str(profile_file), "per_function": True,
        }  # fmt: skip
        return make_config(output, **{**settings, **changes})

    return config


@pytest.fixture(scope="module")
def folder(make: Callable[..., LoraConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_lora(make(tmp_path_factory.mktemp("per-function") / "out"))


def test_each_function_has_a_normal_adapter_folder_on_its_layers(folder: Path, trained: Path) -> None:
    for name in ("ocr", "count"):
        files = {p.name for p in (folder / name).iterdir()}
        assert files >= {p.name for p in trained.iterdir()}
        plan = json.loads((folder / name / "plan.json").read_text())
        assert plan["layers"] == LAYERS[name] and plan["functions"] == {name: LAYERS[name]}
        assert is_done(folder / name)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"ocr", "count"}
    assert is_done(folder)


def test_each_is_trained_on_its_own_rows(
    make: Callable[..., LoraConfig], tmp_path: Path, monkeypatch
) -> None:
    seen = {}
    monkeypatch.setattr(run, "_train_one", lambda c, s, p, rows: seen.update({rows.function: rows}))
    monkeypatch.setattr(per_function, "_outcome", lambda folder: {"layers": []})
    train_lora(make(tmp_path / "a"))
    selected = BUCKETS[1:]
    for name, rows in seen.items():
        assert [r.row for r in rows.rows] == [i for i, bucket in enumerate(selected) if bucket == name]


def test_the_summary_says_what_was_done(folder: Path) -> None:
    found = json.loads((folder / "summary.json").read_text())
    assert found["schema_version"] == 1 and found["shared_layers"] == {}
    assert list(found["functions"]) == ["ocr", "count"]
    ocr, count = found["functions"]["ocr"], found["functions"]["count"]
    assert (ocr["folder"], ocr["layers"], ocr["rows"], ocr["steps"]) == ("ocr", [10], 11, 1)
    assert (count["layers"], count["rows"]) == ([5, 6], 8)
    assert ocr["train_loss"] > 0 and "eval_loss" not in ocr
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"summary.json", "ocr/adapter_model.safetensors", "count/plan.json"} <= set(manifest)


def test_functions_are_resumed_one_by_one(
    make: Callable[..., LoraConfig], tmp_path: Path, monkeypatch
) -> None:
    """The second function fails once: the first is not trained again."""
    trained_rows: list[int] = []
    train_and_save = run._train_and_save

    def failing(config, profile, rows, *args):
        trained_rows.append(len(rows.rows))
        if rows.function == "count" and len(trained_rows) == 2:
            raise KeyboardInterrupt
        train_and_save(config, profile, rows, *args)

    monkeypatch.setattr(run, "_train_and_save", failing)
    config = make(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train_lora(config)
    assert is_done(config.output / "ocr") and not is_done(config.output)
    before = (config.output / "ocr" / "adapter_model.safetensors").stat().st_mtime_ns
    train_lora(config)
    assert trained_rows == [11, 8, 8] and is_done(config.output)
    assert (config.output / "ocr" / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="learning_rate"):
        train_lora(make(tmp_path / "out", learning_rate=0.5))


def test_layers_of_two_functions_are_named(
    make: Callable[..., LoraConfig], tmp_path: Path, profile_file
) -> None:
    def shared(**changes: object) -> dict[str, list[int]]:
        config = make(tmp_path, functions=("count", "ocr", "emotion"), **changes)
        return per_function.shared_layers(per_function.planned_layers(config, Profile.load(profile_file)))

    assert shared() == {"count+emotion": [6]}
    everywhere = list(range(12))
    assert shared(control="all") == {
        "count+ocr": everywhere, "count+emotion": everywhere, "ocr+emotion": everywhere,
    }  # fmt: skip


def test_a_function_without_rows_is_refused_before_any_is_trained(
    make: Callable[..., LoraConfig], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no row of .* trains emotion; .*\"ocr\": 11") as caught:
        train_lora(make(tmp_path / "a", functions=("ocr", "emotion")))
    assert caught.value.exit_code == 3 and not (tmp_path / "a").exists()


def test_rows_nobody_scored_are_refused(make, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which function each row trains"):
        train_lora(make(tmp_path / "a", data=str(data_file)))


def test_a_dry_run_shows_every_function(make: Callable[..., LoraConfig], tmp_path: Path, capsys) -> None:
    train_lora(make(tmp_path / "a", dry_run=True))
    shown = capsys.readouterr().out
    assert shown.count("●") == 3 * 7 and "rows of ocr 11" in shown and "rows of count 8" in shown
    assert not (tmp_path / "a").exists()
