"""A run that was killed, stopped or starved goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resume_cases as cases
import resume_faults as faults
import torch
from nursery import nursery
from safetensors.torch import load_file

from vfl_train.training import checkpoint, state


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.build_tiny(tmp_path_factory.mktemp("tiny"))


# --- R1, R3: the same result ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_at_every_write_boundary_of_a_save_is_resumed_to_the_same_adapter(
    tiny: Path, tmp_path: Path
) -> None:
    """R1: the second of three saves, killed before each of its disk calls and after the last."""
    result = nursery(cases.crash_everywhere, tiny, tmp_path)
    whole, resumed = result["whole"], result["resumed"]
    assert len(resumed) > 20  # 7 files and the manifest: write and flush each, and the folders
    saved = [("step-000004" in r["left"]) for r in resumed]
    assert saved == sorted(saved) and set(saved) == {False, True}
    for boundary, (r, has_4) in enumerate(zip(resumed, saved, strict=True), start=1):
        assert r["code"] == 0, (boundary, r["summary"])
        assert r["summary"]["adapter"] == whole["adapter"], boundary
        assert r["summary"]["state"] == whole["state"], boundary
        assert r["summary"]["order"] == whole["order"][4 if has_4 else 2 :], boundary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulation", "stops"),
    [(0, 1, (1, 3, 5, 10)), (2, 1, (1, 3, 5, 10)), (0, 3, (1, 2, 3, 4)), (2, 3, (1, 2, 3, 4))],
)
def test_resumed_equals_uninterrupted_to_the_bit(
    tiny: Path, tmp_path: Path, workers: int, accumulation: int, stops: tuple[int, ...]
) -> None:
    """R3: stopped after step 1, within an epoch, at the edge of one and after the last step; two epochs of
    five batches (the last optimizer step of an epoch is short under accumulation), with dropout."""
    changes = {
        "max_steps": -1, "num_train_epochs": 2, "dataloader_num_workers": workers,
        "gradient_accumulation_steps": accumulation, "logging_steps": 2,
    }  # fmt: skip
    results = nursery(cases.resume_from_each, tiny, tmp_path, list(stops), changes)
    whole = results.pop("whole")
    epochs = [sorted(row for batch in whole["order"][i : i + 5] for row in batch) for i in (0, 5)]
    assert epochs == [list(range(10))] * 2
    assert whole["order"][:5] != whole["order"][5:]
    assert results.pop("stored") == whole  # checkpoints change nothing
    ends_epoch = {1: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 3: [3, 5, 8, 10]}[accumulation]
    for step, resumed in results.items():
        done = ends_epoch[int(step) - 1]
        assert resumed.pop("order") == whole["order"][done:], step
        if done < 10:  # after the last step nothing is saved again
            assert resumed["state"] == whole["state"], step
        assert resumed["adapter"] == whole["adapter"], step
        assert resumed["log"] == whole["log"], step


# --- R4: a damaged checkpoint --------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_older_one_gives_the_same_end(
    tiny: Path, tmp_path: Path
) -> None:
    """R4 through the command; test_checkpoint has every file and every kind of damage."""
    results = nursery(cases.damages, tiny, tmp_path)
    whole = results.pop("whole")
    assert set(results) == {
        "adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "progress.json",
        "MANIFEST.json", "all", "loose",
    }  # fmt: skip
    nothing_left, loose = results.pop("all"), results.pop("loose")
    assert nothing_left["code"] == 4 and "adapter" not in nothing_left
    assert nothing_left["stderr"].count("is passed over: rng.safetensors") == 2
    assert nothing_left["checkpoints"] == ["step-000002", "step-000004"]
    assert loose["code"] == 0 and loose["adapter"] == whole and "passed over" not in loose["stderr"]
    for name, result in results.items():
        assert result["code"] == 0 and result["adapter"] == whole, name
        assert f"step-000004 is passed over: {name}" in result["stderr"]
        assert "resuming from checkpoint step-000002" in result["stderr"]


# --- R5: another run -----------------------------------------------------------------------------------


def test_a_changed_run_is_refused_naming_key_old_and_new_value(tiny: Path, tmp_path: Path) -> None:
    results = nursery(cases.drifts, tiny, tmp_path)
    expected = {
        "lr": "options.learning_rate was 0.001, is now 0.002",
        "layers": 'options.layers was "1-2", is now "0-1"',
        "data": 'inputs.data was "',
        "seed": "options.seed was 0, is now 1",
        "world": "world_size was 1, is now 2",
        "no such key": "did you mean learning_rate?",
    }
    for name, message in expected.items():
        assert results[name]["code"] == 2, (name, results[name]["stderr"])
        assert message in results[name]["stderr"], name
        assert results[name]["checkpoints"] == ["step-000002"], name
    for name, key in (("lr", "learning_rate"), ("data", "data"), ("seed", "seed"), ("world", "world_size")):
        assert f"--allow-config-change {key} goes on" in results[name]["stderr"]
    assert "--allow-config-change" not in results["layers"]["stderr"]
    allowed = results["lr allowed"]
    assert allowed["code"] == 0 and allowed["checkpoints"] == []
    assert "options.learning_rate was 0.001, is now 0.002, as allowed" in allowed["stderr"]
    for name in ("same", "other things"):
        assert results[name]["code"] == 0, results[name]["stderr"]
        assert "resuming from checkpoint step-000002" in results[name]["stderr"]


# --- R21: signals --------------------------------------------------------------------------------------


def test_a_signal_ends_the_step_and_commits_one_checkpoint(tiny: Path, tmp_path: Path) -> None:
    results = nursery(faults.signals, tiny, tmp_path)
    whole, shas = results.pop("whole")["sha"], results.pop("sha")
    two, three = ["step-000002"], ["step-000002", "step-000003"]
    expected = {
        "TERM in step": (143, three),
        "TERM in step, no checkpoints asked for": (143, ["step-000003"]),
        "TERM in the last step of an epoch": (143, ["step-000005"]),
        "TERM to workers too": (143, three),
        "INT to workers too": (130, three),
        "TERM in save": (143, two),
        "TERM twice in step": (143, two),
        "TERM then INT in save": (130, None),
    }
    assert set(results) == set(expected)
    for name, (code, left) in expected.items():
        result = results[name]
        assert result["code"] == code, (name, result["stderr"])
        if left is None:  # ended at once in the first save: what is staged is not a checkpoint
            assert not [p for p in result["checkpoints"] if p.startswith("step-")], name
        else:
            assert result["checkpoints"] == left, name
        assert result["resumed"]["code"] == 0, (name, result["resumed"]["stderr"])
        if "twice" in name or "then" in name:
            assert "stopped at once" in result["stderr"], name
        else:
            assert f"stopped after step {int(left[-1][-6:])}" in result["stderr"], name
        if "epoch" not in name:  # that one has another number of steps
            assert shas[name] == whole, name


# --- R10: the disk -------------------------------------------------------------------------------------


def check_starved(result: dict[str, Any], reason: str) -> None:
    starved, again = result["starved"], result["again"]
    assert starved["code"] == 7, starved["stderr"]
    (line,) = [line for line in starved["stderr"].splitlines() if line.startswith("error:")]
    assert reason in line
    assert starved["checkpoints"] == ["step-000002"]
    assert again["code"] == 0 and "resuming from checkpoint step-000002" in again["stderr"]


def test_a_disk_that_is_full_at_the_second_save(tiny: Path, tmp_path: Path) -> None:
    """R10, by a limit of the kernel on the size of files: it needs no rights."""
    check_starved(nursery(faults.full_disk, tiny, tmp_path / "run"), "may not grow further")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if (
        os.geteuid()
        or shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_is_full_at_the_second_save(tiny: Path, small_disk: Path) -> None:
    check_starved(nursery(faults.filled_tmpfs, tiny, small_disk / "run"), "the disk is full")


def test_too_small_a_disk_is_refused_before_the_first_step(tiny: Path, tmp_path: Path) -> None:
    result = nursery(faults.no_room, tiny, tmp_path / "run")
    assert result["code"] == 7 and "has room for 0.0 MB, 2 checkpoints need" in result["stderr"]


# --- R14: numbers --------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_stops_within_the_step_and_is_in_no_file(
    tiny: Path, tmp_path: Path
) -> None:
    results = nursery(faults.poisons, tiny, tmp_path)
    words = {"in_loss": "the loss is", "in_gradient": "the gradient is", "in_activation": "not finite at"}
    assert set(results) == set(words)
    for name, result in results.items():
        assert result["code"]["code"] == 5, (name, result["stderr"])
        rows = ", ".join(map(str, result["code"]["rows"]))
        assert words[name] in result["stderr"], name
        assert f"step 3, in the batch of rows {rows};" in result["stderr"], name
        assert result["checkpoints"] == ["step-000002"]
        files = list((tmp_path / name).rglob("*.safetensors"))
        assert len(files) == 3  # adapter, optimizer, random generators of the one checkpoint
        for file in files:
            for key, tensor in load_file(file).items():
                assert bool(torch.isfinite(tensor.float()).all()), (file.name, key)


# --- R24: a long run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_hundred_steps_leak_nothing(tiny: Path, tmp_path: Path) -> None:
    """R24. Between epochs, where no worker runs and no batch is under way: each holds open files."""
    result = nursery(faults.soak, tiny, tmp_path, 500, 50)
    assert result["children"] == []
    steps, memory, files = (np.array(column, dtype=float) for column in zip(*result["samples"], strict=True))
    assert len(steps) == 10
    slope = float(np.polyfit(steps, memory, 1)[0]) * 100
    assert slope < 1.0, f"{slope:.2f} MB in 100 steps"
    assert len(set(files)) == 1, files


# --- what a checkpoint is ------------------------------------------------------------------------------


def test_each_checkpoint_is_an_adapter_folder_and_holds_nothing_that_runs_code(
    tiny: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    nursery(cases.killed_at, tiny, tmp_path / "run", 4)
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    suffixes = {p.suffix for p in folder.iterdir()}
    assert suffixes == {".safetensors", ".json", ".jinja"}
    base = AutoModelForImageTextToText.from_pretrained(tiny / "base")
    adapted = PeftModel.from_pretrained(base, folder)
    loaded = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if ".lora_" in n}
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items()) and len(saved) == 28
    assert AutoProcessor.from_pretrained(folder).chat_template
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert manifest["fingerprint"]["options"]["lora_dropout"] == 0.2
    assert {"torch", "vfl-train"} <= set(manifest["fingerprint"]["versions"])
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_random_generators_go_on_where_they_were() -> None:
    import random

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))]

    draw()  # gauss and standard_normal keep a second number
    kept = state.random_state()
    expected = [draw(), draw()]
    state.set_random_state(kept)
    assert [draw(), draw()] == expected


def test_state_of_another_plan_is_refused_by_name(tmp_path: Path) -> None:
    from vfl_train.errors import VerificationError

    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    (tmp_path / state.WEIGHTS).write_bytes(state.parameter_bytes([("x.lora_A.default.weight", a)]))
    with pytest.raises(VerificationError, match=r"1 tensors missing, 1 unplanned \(y\.lora_A\.weight\)"):
        state.load_parameters(tmp_path, [("y.lora_A.default.weight", b)])
    with pytest.raises(VerificationError, match=r"has shape \(2,\), the plan's is \(3,\)"):
        state.load_parameters(tmp_path, [("x.lora_A.default.weight", torch.nn.Parameter(torch.ones(3)))])
    with pytest.raises(VerificationError, match=r"optimizer\.safetensors cannot be read"):
        state.load_optimizer(tmp_path, torch.optim.AdamW([a]), [("x", a)], keep_settings=False)
