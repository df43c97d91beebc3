"""Training that begins at the lowest adapted layer is the same training; and where it would not be, it is
refused."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backward_visits import watch
from safetensors import safe_open
from safetensors.torch import load_file
from training_rows import Adapted, largest_difference, rows_of, write_rows

import vfl_train.data.videos as videos_module
from vfl_train.config import LoraConfig
from vfl_train.data.collator import Encoded
from vfl_train.data.overlong import FittingCollator
from vfl_train.data.rows import Row
from vfl_train.errors import ConfigError, DiskError
from vfl_train.interventions.hooks import in_place_of
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import weights_digest
from vfl_train.training.frozen import limit_backward
from vfl_train.training.per_function import one_function
from vfl_train.training.prefix_cache import (
    PrefixCollator,
    cache_folder,
    cache_settings,
    check_possible,
    prefix_cached,
    processor_digest,
)
from vfl_train.training.prefix_start import PREFIX_STATES
from vfl_train.training.prefix_store import Entry, PrefixStore, row_key
from vfl_train.training.run import train_lora

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "gemma3", "idefics3")
MakeConfig = Callable[..., LoraConfig]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows_of(write_rows(tmp_path_factory.mktemp("rows")))


def config_of(folder: Path, **changes: Any) -> LoraConfig:
    settings = {"model": "tiny", "data": "rows.jsonl", "output": folder / "adapter", "layers": "2"}
    return LoraConfig(**{**settings, "per_device_train_batch_size": 2, "cache_prefix": True, **changes})


def cached(
    a: Adapted, rows: Sequence[Row], folder: Path, digest: str = "d", **changes: Any
) -> AbstractContextManager[PrefixCollator]:
    return prefix_cached(
        a.vlm, a.model, a.plan, rows, a.collator, config_of(folder, **changes), digest=digest, autocast=None
    )


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# --- the same training -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_whole_batches(family: str, rows: list[Row], tmp_path: Path) -> None:
    """Unequal lengths and a row without an image in one batch; the entries are made in other batches."""
    a = Adapted(family, "2")
    limit_backward(a.vlm, a.plan, recompute=True)
    batches = [a.collator(rows), a.collator(rows[3:4])]
    whole = [(a.loss(batch).item(), a.gradients(batch)) for batch in batches]
    with cached(a, rows, tmp_path) as collate, watch(a.vlm) as seen:
        for part, (loss, gradients) in zip((rows, rows[3:4]), whole, strict=True):
            batch = collate(part)
            assert not any(name.startswith("pixel") for name in batch)
            assert a.loss(batch).item() == pytest.approx(loss, rel=1e-5)
            assert largest_difference(gradients, a.gradients(batch)) < 1e-5
            mixed = a.loss(a.collator(part)).item()  # a batch without states still runs whole
            assert mixed == pytest.approx(loss, rel=1e-6)
            a.loss(batch)
            inner = a.vlm.base(**without_labels(a.collator(part))).logits  # nor is anything left over
            assert torch.equal(inner, a.model(**without_labels(a.collator(part))).logits)
    assert seen.forward["layer 0"] == 6  # whole batches only, three each
    assert seen.forward["layer 2"] == 6 + 8  # and of each short one three forwards and a recomputation
    assert a.loss(batches[0]).item() == pytest.approx(whole[0][0], rel=1e-6)  # the model is as it was


def test_dtype_and_layer_stand_in_the_file(rows: list[Row], tmp_path: Path) -> None:
    a = Adapted("qwen2_5_vl", "2")
    a.vlm.base.to(torch.bfloat16)
    batch = a.collator(rows)
    whole = a.loss(batch).item()
    with cached(a, rows, tmp_path) as collate:
        short = collate(rows)
        assert short[PREFIX_STATES].dtype == torch.bfloat16
        assert a.loss(short).item() == pytest.approx(whole, rel=1e-2)
    with safe_open(entries(tmp_path)[0], "pt") as f:
        assert f.metadata()["dtype"] == "bfloat16" and f.metadata()["layer"] == "2"
        assert f.get_tensor("hidden").dtype == torch.bfloat16
    settings = json.loads(next(tmp_path.rglob("settings.json")).read_text())
    assert settings["dtype"] == "bfloat16" and settings["model"] == "tiny-qwen2_5_vl"


def losses(folder: Path) -> list[float]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that rows are encoded from."""
    labels: list[str] = []
    inner = videos_module.open_image
    monkeypatch.setattr(videos_module, "open_image", lambda ref: (labels.append(ref.label), inner(ref))[1])
    return labels


def test_a_cached_run_gives_the_same_losses_and_adapter(
    make_config: MakeConfig, tmp_path: Path, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"max_steps": 8, "learning_rate": 5e-3}
    whole = train_lora(make_config(tmp_path / "whole", **settings))
    cache = {**settings, "cache_prefix": True, "cache_dir": tmp_path / "cache"}
    first = train_lora(make_config(tmp_path / "first", **cache))
    assert len(entries(tmp_path / "cache")) == 24
    assert "24 rows at layer 7, about" in caplog.text and "free)" in caplog.text
    opened.clear()
    second = train_lora(make_config(tmp_path / "second", **cache))
    assert not opened
    assert losses(first) == losses(second) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(whole)) == 8
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (whole, first, second)]
    assert largest_difference(adapters[0], adapters[1]) < 1e-3  # eight steps of Adam amplify rounding
    assert largest_difference(adapters[1], adapters[2]) == 0


def test_another_run_with_higher_layers_begins_at_the_cached_one(
    make_config: MakeConfig, tmp_path: Path, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = train_lora(make_config(tmp_path / "whole", layers="10"))
    cache = {"cache_prefix": True, "cache_dir": tmp_path / "cache", "overlong": "drop"}
    train_lora(make_config(tmp_path / "low", layers="8", **cache))
    opened.clear()
    high = train_lora(make_config(tmp_path / "high", layers="10-11", **cache))
    assert not opened and "begin at layer 8" in caplog.text
    assert {path.parts[-3] for path in entries(tmp_path / "cache")} == {"layer-8"}
    assert len(losses(high)) == len(losses(whole)) == 2
    assert losses(high)[0] == pytest.approx(losses(whole)[0], rel=1e-5)  # B is zero in the first step


def test_two_processes_fill_one_cache(make_config: MakeConfig, tmp_path: Path) -> None:
    """Each computes half of the entries, and both begin from all of them."""
    one = train_lora(make_config(tmp_path / "one"))
    cache = {"cache_prefix": True, "cache_dir": tmp_path / "cache"}
    two = train_lora(make_config(tmp_path / "two", num_processes=2, per_device_train_batch_size=2, **cache))
    assert len(entries(tmp_path / "cache")) == 24
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(one)) == 2


def test_functions_share_a_cache_beside_their_folder(tmp_path: Path) -> None:
    config = LoraConfig(
        model="tiny", data="rows.jsonl", output=tmp_path / "out", functions=("ocr", "count"), profile="p",
        per_function=True, cache_prefix=True,
    )  # fmt: skip
    assert cache_folder(one_function(config, "ocr")) == cache_folder(config) == tmp_path / "prefix-cache"
    assert cache_folder(replace(config, cache_dir=tmp_path / "c")) == tmp_path / "c"


# --- what an entry depends on ------------------------------------------------------------------------


def test_row_keys(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    one, same = (rows_of(write_rows(tmp_path / name)) for name in "ab")
    assert [row_key(row) for row in one] == [row_key(row) for row in same]  # wherever they lie
    assert len({row_key(row) for row in one}) == len(one)
    other = rows_of(write_rows(tmp_path / "c", seed=1))  # the same words, other images
    changed = [row_key(x) != row_key(y) for x, y in zip(one, other, strict=True)]
    assert changed == [bool(row.images) for row in one]


def test_settings_that_matter_give_another_folder(tmp_path: Path) -> None:
    a = Adapted("qwen2_5_vl", "2")

    def folder(digest: str = "d", dtype: torch.dtype | None = None, layer: int = 2) -> Path:
        return PrefixStore(tmp_path, cache_settings(a.vlm, digest, dtype), layer).folder

    found = {folder(), folder(digest="e"), folder(dtype=torch.bfloat16), folder(layer=3)}
    a.vlm.processor.image_processor.size["longest_edge"] //= 2  # what --max-pixels does
    found.add(folder())
    a.vlm.base.to(torch.bfloat16)
    found.add(folder())
    assert len(found) == 6


def test_rows_that_were_shrunk_have_entries_of_their_own(rows: list[Row], tmp_path: Path) -> None:
    a = Adapted("qwen2_5_vl", "2")
    whole = a.collator
    with cached(a, rows[:2], tmp_path):
        pass
    a.collator = FittingCollator(a.vlm.encoder, {rows[1].row: 1024})
    with cached(a, rows[:2], tmp_path) as collate:
        batch = collate(rows[1:2])
        assert batch["input_ids"].shape[1] < whole(rows[1:2])["input_ids"].shape[1]
        assert a.loss(batch).item() == pytest.approx(a.loss(a.collator(rows[1:2])).item(), rel=1e-5)
    assert len(entries(tmp_path)) == 3


def test_digests_tell_processors_and_weights_apart() -> None:
    a, b = Adapted("qwen2_5_vl", "2"), Adapted("qwen2_5_vl", "2")
    assert processor_digest(a.vlm.processor) == processor_digest(b.vlm.processor)
    b.vlm.processor.chat_template += " "
    assert processor_digest(a.vlm.processor) != processor_digest(b.vlm.processor)
    before = weights_digest(b.vlm)
    assert before == weights_digest(b.vlm)
    plain = VisionLanguageModel(b.vlm.base, b.vlm.processor, "plain")
    b.model.unload()
    assert weights_digest(plain) == before  # LoRA above does not count
    with torch.no_grad():
        b.vlm.base.get_input_embeddings().weight[7, 3] += 1e-3  # one number of many
    assert weights_digest(plain) != before


# --- files -------------------------------------------------------------------------------------------


def test_damaged_entries_are_computed_again(
    rows: list[Row], tmp_path: Path, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    a = Adapted("qwen2_5_vl", "2")
    with cached(a, rows, tmp_path) as collate:
        good = a.loss(collate(rows)).item()
    cut, empty = entries(tmp_path)[:2]
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    empty.write_bytes(b"")
    with cached(a, rows, tmp_path) as collate:
        assert a.loss(collate(rows)).item() == good
    assert len(cut.read_bytes()) == len(content)
    damaged = [r.message for r in caplog.records if r.levelno == logging.WARNING and "damaged" in r.message]
    assert sorted(str(p) in "".join(damaged) for p in (cut, empty)) == [True, True] and len(damaged) == 2


@pytest.mark.parametrize("name", ["hidden", "input.input_ids"])
def test_a_bit_that_turned_over_is_found_and_healed(name: str, rows: list[Row], tmp_path: Path) -> None:
    a = Adapted("qwen2_5_vl", "2")
    with cached(a, rows, tmp_path) as collate:
        good = a.loss(collate(rows)).item()
        path = collate.store.path(collate.keys[rows[1].uid])
        content = bytearray(path.read_bytes())
        header = int.from_bytes(content[:8], "little")
        begin, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
        content[8 + header + begin] ^= 1
        path.write_bytes(content)
        with pytest.raises(DiskError, match="has changed since it was written"):
            collate(rows)
    with cached(a, rows, tmp_path) as collate:
        assert a.loss(collate(rows)).item() == good


def test_an_entry_that_goes_while_training_is_named(rows: list[Row], tmp_path: Path) -> None:
    a = Adapted("qwen2_5_vl", "2")
    with cached(a, rows, tmp_path) as collate:
        lost = collate.store.path(collate.keys[rows[1].uid])
        lost.unlink()
        with pytest.raises(DiskError, match=lost.name):
            collate(rows)


def test_rows_of_another_file_run_whole(rows: list[Row], tmp_path: Path) -> None:
    a = Adapted("qwen2_5_vl", "2")
    with cached(a, rows[:2], tmp_path) as collate:
        assert PREFIX_STATES in collate(rows[:2])
        assert PREFIX_STATES not in collate(rows[1:3]) and "pixel_values" in collate(rows[1:3])


def test_equal_rows_share_an_entry(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    again = rows_of(write_rows(tmp_path / "again"))
    a = Adapted("qwen2_5_vl", "2")
    with cached(a, [*rows, *again], tmp_path) as collate:
        assert len(entries(tmp_path)) == len(rows)
        both = collate([rows[0], again[0]])
        assert torch.equal(*both[PREFIX_STATES])


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    hidden = torch.randn(500, 64)
    mask = torch.zeros(500, dtype=torch.bool)
    entry = Entry(Encoded({"input_ids": torch.arange(500)[None]}, mask), hidden)
    stores = [PrefixStore(tmp_path, {"a": 1}, 3) for _ in range(3)]
    stores[0].write("ab12", entry)
    writers = [
        threading.Thread(target=lambda s=store: [s.write("ab12", entry) for _ in range(60)])
        for store in stores[:2]
    ]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers) or not reads:
        assert stores[2].has("ab12")
        assert torch.equal(stores[2].read("ab12").hidden, hidden)
        reads += 1
    for writer in writers:
        writer.join()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(".tmp")] == []


# --- refused -----------------------------------------------------------------------------------------


def test_no_room_writes_nothing(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Adapted("qwen2_5_vl", "2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with (
        pytest.raises(DiskError, match=r"needs about .* kB .* where 10 kB are free"),
        cached(a, rows, tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_what_is_written(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfl_train.training.prefix_cache._BLOCK", 1)
    monkeypatch.setattr("vfl_train.training.prefix_cache._MARGIN", 1.0)
    a = Adapted("qwen2_5_vl", "2")
    with cached(a, rows, tmp_path / "first"):
        pass
    written = sum(path.stat().st_size for path in entries(tmp_path))
    for free, fits in ((int(written * 0.8), False), (written, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        try:
            with cached(a, rows, tmp_path / str(fits)):
                assert fits
        except DiskError:
            assert not fits


def test_layer_0_and_parts_before_the_decoder_are_refused() -> None:
    for a, reason in (
        (Adapted("llava", "0-1"), "layer 0 is trained"),
        (Adapted("qwen2_5_vl", "2", extra=("model.visual.blocks.0.attn.proj",)), "before the decoder"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_possible(a.vlm, a.plan)


def test_dropout_below_is_refused_and_above_is_not() -> None:
    a = Adapted("llava", "2")
    a.vlm.layers[3].self_attn.attention_dropout = 0.1
    assert check_possible(a.vlm, a.plan) == 2
    a.vlm.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn drops out 0\.1"):
        check_possible(a.vlm, a.plan)
    b = Adapted("llava", "2")
    b.vlm.base.model.vision_tower.extra = torch.nn.Dropout(0.2)
    with pytest.raises(ConfigError, match=r"vision_tower\.extra drops out 0\.2"):
        check_possible(b.vlm, b.plan)


def test_deep_stack_above_the_lowest_layer_is_refused(rows: list[Row], tmp_path: Path) -> None:
    a = Adapted("qwen3_vl", "1")
    with (
        pytest.raises(ConfigError, match="adds something to the hidden states after layer 1"),
        cached(a, rows, tmp_path),
    ):
        pass
    assert not entries(tmp_path)


def test_a_layer_that_reads_the_image_elsewhere_is_refused(rows: list[Row], tmp_path: Path) -> None:
    """Stands for cross-attention: layer 3 gets image features by a way of its own."""
    a = Adapted("llava", "2")
    features: list[torch.Tensor] = []
    a.vlm.base.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: features.append(output.mean())
    )
    inner = a.vlm.layers[3].mlp.forward

    def with_features(hidden: torch.Tensor) -> torch.Tensor:
        return inner(hidden) + (features.pop() if features else 0)

    with (
        in_place_of(a.vlm.layers[3].mlp, with_features),
        pytest.raises(ConfigError, match="get more of the image"),
        cached(a, rows, tmp_path),
    ):
        pass
    assert not entries(tmp_path)


def test_augmentation_is_refused(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Adapted("llava", "2")
    kind = type(a.vlm.processor.image_processor)
    inner = kind.preprocess

    def shaken(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out["pixel_values"] = out["pixel_values"] + torch.randn(1)
        return out

    monkeypatch.setattr(kind, "preprocess", shaken)
    with pytest.raises(ConfigError, match="pixel_values of the same row"), cached(a, rows, tmp_path):
        pass
    assert not entries(tmp_path)


def test_a_refused_run_touches_no_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 0 is trained"):
        train_lora(make_config(tmp_path / "out", layers="0-3", cache_prefix=True))
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())
