"""DeepSpeed's settings, and what one process alone makes of the tools for several."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vfl_train.config import LoraConfig
from vfl_train.data.collator import Collator
from vfl_train.data.readers import read_dataset
from vfl_train.errors import ConfigError, DistributedError
from vfl_train.models import VisionLanguageModel
from vfl_train.training import deepspeed, distributed, mixed
from vfl_train.training.agreement import GradientWatch, all_windows
from vfl_train.training.run import train_lora

MakeConfig = Callable[..., LoraConfig]


@pytest.mark.parametrize("name", deepspeed.NAMES)
def test_the_bundled_settings(name: str, make_config: MakeConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(deepspeed, "_prepare", lambda on_cpu: None)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: object())
    settings = deepspeed.settings_of(
        make_config(tmp_path, deepspeed=name, gradient_accumulation_steps=3, max_grad_norm=0.5)
    )
    assert settings is not None
    assert deepspeed.stage_of(settings) == int(name[-1])
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert settings["train_batch_size"] == 12 and settings["train_micro_batch_size_per_gpu"] == 4
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (3, 0.5)
    assert settings["bf16"] == {"enabled": False}  # the CPU
    assert "auto" not in json.dumps(settings)


def test_settings_from_a_file(make_config: MakeConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(deepspeed, "_prepare", lambda on_cpu: None)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: object())
    path = tmp_path / "mine.json"
    path.write_text(
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "train_batch_size": 4}'
    )
    settings = deepspeed.settings_of(make_config(tmp_path, deepspeed=str(path), bf16=True))
    assert settings is not None and settings["zero_optimization"] == {"stage": 2}
    assert settings["bf16"] == {"enabled": True}
    with pytest.raises(ConfigError, match="sets train_batch_size to 4, the options mean 8"):
        deepspeed.settings_of(make_config(tmp_path, deepspeed=str(path), gradient_accumulation_steps=2))


@pytest.mark.parametrize(
    "content, text",
    [
        ("{", "not readable JSON"),
        ("[]", "no section zero_optimization"),
        ('{"zero_optimization": {"stage": 4}}', "stage must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', "sets optimizer"),
        ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', "sets fp16"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "nvme"),
    ],
)
def test_a_file_that_cannot_work(content: str, text: str, make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        train_lora(make_config(tmp_path / "out", deepspeed=str(path)))
    assert not (tmp_path / "out").exists()


def test_a_mistyped_name(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean zero3\?"):
        train_lora(make_config(tmp_path / "out", deepspeed="zero-3"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_zero3_does_not_cut_quantized_weights(bits: str, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ZeRO-3 cannot cut"):
        train_lora(make_config(tmp_path / "out", deepspeed="zero3", **{f"load_in_{bits}": True}))


def test_a_prefix_cache_is_refused_under_zero3_before_anything_starts(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--cache-prefix does not work under ZeRO-3"):
        train_lora(make_config(tmp_path / "out", deepspeed="zero3", cache_prefix=True, num_processes=2))


def test_without_deepspeed_the_pip_command_is_named(make_config, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a)
    )
    with pytest.raises(
        ConfigError, match=r"needs the package deepspeed.*pip install 'vfl-train\[deepspeed\]'"
    ):
        train_lora(make_config(tmp_path / "out", deepspeed="zero2"))


# --- one process alone ----------------------------------------------------------------------------


def test_a_process_alone_agrees_with_itself() -> None:
    assert distributed.world() == distributed.World()
    assert distributed.exchange({"a": 1}, "x") == [{"a": 1}]
    distributed.agree({"a": 1}, "x")
    with distributed.session("cpu", 5) as here:
        assert here.is_main and here.size == 1
    loss = torch.tensor(float("nan"))
    ((rows, value),) = all_windows([([3], loss)])
    assert rows == [3] and value != value


def test_the_watch_sees_zero_and_missing_gradients() -> None:
    used, zeroed, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    watch = GradientWatch([("used", used), ("zeroed", zeroed), ("unused", unused)])
    (used * torch.tensor([0.0, 0.0, 2.0])).sum().backward()
    (zeroed * 0).sum().backward()
    (used * 0).sum().backward()  # once seen stays seen
    assert watch.finish() == ["zeroed", "unused"]


def test_only_errors_of_a_lost_process_are_turned() -> None:
    with pytest.raises(DistributedError, match="lost or hangs"), distributed.lost_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), distributed.lost_processes():
        raise RuntimeError("shapes differ")


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_world", distributed.World(1, 2))
    monkeypatch.setattr(distributed, "exchange", lambda value, what, patience=None: ["running", None])
    monkeypatch.setattr(distributed, "agree", lambda facts, what: None)
    with distributed.open_run(tmp_path / "out", {"command": "x"}, False) as run:
        assert run.resumed and not run.already_done
        run.write_json("a.json", {})
        run.write_bytes("sub/b", b"x")
    assert not list(tmp_path.iterdir())


# --- text and image rows ----------------------------------------------------------------------------


def test_a_text_batch_gets_an_unsupervised_image_under_zero3_only(
    base_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(read_dataset(data_file).rows)
    texts = [row for row in _without_images(data_file)]
    collator = Collator(VisionLanguageModel.load(str(base_folder), device="cpu").encoder)
    zero3 = {"zero_optimization": {"stage": 3}}
    assert mixed.same_modules(collator, rows + texts, zero3) is collator  # one process
    monkeypatch.setattr(mixed, "world", lambda: distributed.World(0, 2))
    assert mixed.same_modules(collator, rows + texts, {"zero_optimization": {"stage": 2}}) is collator
    assert mixed.same_modules(collator, rows + texts, None) is collator
    assert mixed.same_modules(collator, rows, zero3) is collator
    assert mixed.same_modules(collator, texts, zero3) is collator
    wrapped = mixed.same_modules(collator, rows + texts, zero3)
    with_image, text = wrapped(rows[:2]), wrapped(texts[:2])
    assert with_image["input_ids"].shape[0] == 2 and text["input_ids"].shape[0] == 3
    assert text["pixel_values"].shape[0] > 0 and bool((text["labels"][2] == -100).all())
    plain = collator(texts[:2])
    assert int((text["labels"] != -100).sum()) == int((plain["labels"] != -100).sum()) > 0


def _without_images(data_file: Path) -> list:
    path = data_file.parent / "texts.jsonl"
    turn = {"messages": [{"role": "user", "content": "two ?"}, {"role": "assistant", "content": "2"}]}
    path.write_text("\n".join([json.dumps(turn)] * 3) + "\n", encoding="utf-8")
    return list(read_dataset(path).rows)
