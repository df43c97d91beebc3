"""What --dry-run says a run will take: by probe, and by formula where there is no model to probe."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vfl_train.config import LoraConfig
from vfl_train.training import estimate as module
from vfl_train.training.estimate import Shape, duration, memory_bytes, size, units
from vfl_train.training.run import train_lora

MakeConfig = Callable[..., LoraConfig]
# Qwen2.5-VL-7B at 700 tokens a row: V = 9.6, H = 0.35 (unit model of the trainer bars).
SEVEN = Shape(
    layers=28, lowest=20, hidden=3584, inner=18944, trained=0, weights=16_600_000_000, tokens=700,
    vision_units=9.6, head_units=0.35,
)  # fmt: skip


@pytest.mark.parametrize(
    ("lowest", "partial", "cached"), [(20, 46.3, 16.7), (14, 52.3, 28.7), (24, 42.3, 8.7)]
)
def test_the_unit_model_gives_the_published_table(lowest: int, partial: float, cached: float) -> None:
    assert units(SEVEN, lowest) == pytest.approx(partial, abs=0.05)
    assert units(SEVEN, lowest, cached=True) == pytest.approx(cached, abs=0.05)
    assert units(SEVEN, 0) == pytest.approx(2 * 28 + 2 * 0.35 + 9.6)
    assert units(SEVEN, 20, recompute=True) == pytest.approx(28 + 16 + 0.7 + 9.6)


def test_the_memory_formula_is_near_the_measured_table() -> None:
    """16 rows of 700 tokens: 31.5 GB from layer 20 on, 68.6 GB on all layers, 19.1 GB recomputed."""
    found = [memory_bytes(SEVEN, 16), memory_bytes(replace(SEVEN, lowest=0), 16),
             memory_bytes(SEVEN, 16, recompute=True)]  # fmt: skip
    for value, wanted in zip(found, (31.5e9, 68.6e9, 19.1e9), strict=True):
        assert value / module.OVERHEAD == pytest.approx(wanted, rel=0.1)


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_probe_measures_three_steps_and_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    on_step_end = module._Clock.on_step_end

    def counted(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(module._Clock, "on_step_end", counted)
    before = everything_below(tmp_path) | everything_below(Path(make_config(tmp_path).data).parent)
    config = make_config(
        tmp_path / "out", dry_run=True, max_steps=-1, num_train_epochs=3, save_steps=2,
        report_to="tensorboard",
    )  # fmt: skip
    train_lora(config)
    shown = capsys.readouterr().out
    assert steps == [1, 2, 3]
    assert everything_below(tmp_path) | everything_below(Path(config.data).parent) == before
    assert "probe of 3 steps" in shown and "18 steps: about" in shown and "memory peak" in shown
    assert "2 checkpoints of" in shown and "it pays:" in shown
    adapter = float(shown.split("disk: adapter ")[1].split(" kB")[0])
    assert adapter == pytest.approx(122_880 * 4 / 1000, rel=0.01)


def test_processes_share_the_steps_and_the_probe_runs_without_deepspeed(
    make_config: MakeConfig, tmp_path: Path, capsys
) -> None:
    """24 rows, 5 at once in each of 2 processes; ZeRO-3 could not even load a model in one process alone."""
    changes = {"max_steps": -1, "num_processes": 2, "per_device_train_batch_size": 5, "deepspeed": "zero3"}
    train_lora(make_config(tmp_path / "a", dry_run=True, **changes))
    shown = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps 3" in shown and "3 steps: about" in shown
    assert "on one device, without DeepSpeed" in shown and "a step of 10 rows" in shown
    assert "it pays with more than one pass" in shown  # the last step is not a whole one: still one pass


def test_time_from_the_cache_is_that_of_its_steps_and_of_filling_it() -> None:
    """L = 12 from layer 8 without head and tower: 16 units a step, 8 of them from the cache."""
    shape = module.Shape(12, 8, 64, 128, 1, 1, 10.0)
    known = dict(
        steps=100, rows_a_step=1, memory=1.0, step_seconds=2.0, reason="", adapter_bytes=1.0,
        checkpoint_bytes=1.0, checkpoints=0, shape=shape, cache_bytes=1.0, passes=4.0,
    )  # fmt: skip
    plain, cached = (module.Estimate(**known, cached=c).text() for c in (False, True))
    assert f"100 steps: about {module.duration(200)} " in plain
    assert f"prefix cache: about {module.duration(100)} " in cached
    assert f"{module.duration(25)} to fill it" in cached


def test_rows_that_do_not_fit_memory_are_estimated_by_formula(
    make_config: MakeConfig, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    train_lora(make_config(tmp_path / "a", dry_run=True))
    shown = capsys.readouterr().out
    assert "not probed: the run needs about" in shown and "has 1 kB free" in shown
    assert "memory about" in shown and "LoRA on every layer" in shown


def test_a_model_without_weights_here_is_estimated_by_formula(
    make_config: MakeConfig, tmp_path: Path, base_folder: Path, capsys
) -> None:
    """As after fetching configuration and processor only."""
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(base_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    train_lora(make_config(tmp_path / "a", model=str(bare), dry_run=True))
    shown = capsys.readouterr().out
    assert f"not probed: the weights of {bare} are not on this machine" in shown
    assert shown.count("●") == 3 * 7


def test_the_map_shows_where_gradient_goes(make_config: MakeConfig, tmp_path: Path, capsys, caplog) -> None:
    with caplog.at_level(logging.WARNING, "vfl_train"):
        train_lora(make_config(tmp_path / "a", dry_run=True, layers="10", also_adapt=("vision",)))
    shown = capsys.readouterr().out
    assert shown.count("●") == 7 and shown.count("↓") == 12 + 1
    assert "15 linear modules" in shown and "backward visits all layers, for the vision below" in shown
    assert caplog.text.count("--enable-tower-connector-lora") == 1
    assert "--cache-prefix" not in shown


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (31.5e9, "31.5 GB"), (2e13, "20 TB")]
)
def test_sizes_in_words(value: float, text: str) -> None:
    assert size(value) == text


def test_durations_in_words() -> None:
    assert [duration(s) for s in (3, 300, 30000)] == ["3 s", "5 min", "8.3 h"]
