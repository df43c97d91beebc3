"""Two real processes over gloo: DDP, ZeRO-2 and ZeRO-3 train what one process trains, and none ever hangs.

Imports are most of what a launch costs, so each launch runs several cases (see tests/support/dist_worker.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vfl_train.config import LoraConfig
from vfl_train.errors import DataError, DistributedError
from vfl_train.training import launch
from vfl_train.training.deepspeed import read_settings
from vfl_train.training.run import train_lora

MakeConfig = Callable[..., LoraConfig]
STEPS = 10
LAYERS = range(7, 12)  # layers 7-8 and 10 are adapted; backward visits what lies above the lowest
SUPPORT = Path(__file__).parents[1] / "support"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (extra `deepspeed`)"
)
STRATEGIES = ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]


@pytest.fixture
def run_cases(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> Callable[..., None]:
    """Runs `cases` ([name, changes, changes on rank 1]) in two processes, outputs in `folder`/NAME."""

    def run(folder: Path, cases: list[Any], **settings: object) -> None:
        paths = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
        monkeypatch.setenv("PYTHONPATH", paths)
        monkeypatch.setenv("VFL_TEST", json.dumps(cases, default=str))
        monkeypatch.setattr(launch, "WORKER", "dist_worker")
        train_lora(make_config(folder / "none", num_processes=2, **settings))

    return run


@pytest.fixture(scope="session")
def mixed_file(data_file: Path) -> Path:
    """The same rows, every third without its image: in order, batches of two hold both, one or none."""
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    for row in rows[::3] + rows[1::6]:
        row["images"] = []
        row["messages"][0]["content"] = row["messages"][0]["content"].removeprefix("<image>")
    path = data_file.parent / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def alone(make_config: MakeConfig, mixed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process that the others are compared with, at the same global batch."""
    from dist_worker import Observed

    folder = tmp_path_factory.mktemp("alone")
    for name, changes in cases_of_equality(mixed_file):
        with Observed() as seen:
            train_lora(make_config(folder / name, **{**changes, "per_device_train_batch_size": 4}))
        seen.write(folder / f"{name}-rank-0")
    return folder


def cases_of_equality(mixed_file: Path) -> list[tuple[str, dict[str, Any]]]:
    shared = {"max_steps": STEPS, "max_grad_norm": 1e9}
    return [
        ("plain", shared),
        ("recomputed", {**shared, "max_steps": 1, "activation_checkpointing": True}),
        ("mixed", {**shared, "data": str(mixed_file), "max_steps": 1, "gradient_accumulation_steps": 2}),
    ]


def settings_for_tiny(strategy: str, folder: Path) -> str:
    """The bundled settings of that name; for ZeRO-3, cutting up small parameters too: it would leave all of a
    tiny model whole in every process, and nothing would ever be gathered."""
    if strategy != "zero3":
        return strategy
    settings = read_settings(strategy)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    path = folder / "zero3.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_trains(
    strategy: str, alone: Path, mixed_file: Path, run_cases: Callable[..., None], tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"per_device_train_batch_size": 2}
    if strategy != "ddp":
        extra["deepspeed"] = settings_for_tiny(strategy, tmp_path)
    cases = [[name, {**changes, **extra}, {}] for name, changes in cases_of_equality(mixed_file)]
    run_cases(tmp_path, cases, deepspeed=extra.get("deepspeed"))
    for name, changes in cases_of_equality(mixed_file):
        expected = load_file(alone / f"{name}-rank-0.safetensors")
        assert len(expected) == 21  # 3 layers of 7 linears
        for rank in (0, 1):
            found = load_file(tmp_path / f"{name}-rank-{rank}.safetensors")
            assert found.keys() == expected.keys()
            for key, wanted in expected.items():
                assert float(wanted.abs().max()) > 0, key
                difference = float((found[key] - wanted).norm() / wanted.norm())
                assert difference < 1e-5, (name, rank, key, difference)
        assert losses(tmp_path / name) == pytest.approx(losses(alone / name), rel=1e-4)
        assert len(losses(tmp_path / name)) == changes["max_steps"]
        ours = load_file(tmp_path / name / "adapter_model.safetensors")
        theirs = load_file(alone / name / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, wanted in theirs.items():
            assert ours[key].dtype == torch.float32
            # Adam divides tiny gradients by their own size: rounding moves an entry by a step at most.
            assert float((ours[key] - wanted).norm() / wanted.norm().clamp(min=1e-3)) < 1e-2, key
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"plain-rank-{rank}.json").read_text())
        assert seen["backward"] == {f"layer {i}": STEPS for i in LAYERS}
        assert seen["below"] == {}
        assert bool(seen["slices"]) == (strategy == "zero3")
        seen = json.loads((tmp_path / f"recomputed-rank-{rank}.json").read_text())
        assert seen["backward"] == {f"layer {i}": 1 for i in LAYERS}
        assert seen["below"] == {}
        assert seen["forward"] == {f"layer {i}": 2 if i in LAYERS else 1 for i in range(12)}
    pickles = [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert not pickles


# --- what the processes must agree on, and what happens when one is lost ---------------------------


@pytest.fixture(scope="session")
def shards(data_file: Path) -> dict[str, Path]:
    """Files of 5 and 3 rows, one of text only with 5, and an empty one."""
    lines = data_file.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:5]]
    for row in rows:
        row["images"], row["messages"][0]["content"] = [], "how many ?"
    texts = {
        "five": "\n".join(lines[:5]), "three": "\n".join(lines[:3]), "none": "",
        "text": "\n".join(map(json.dumps, rows)), "one": lines[0],
    }  # fmt: skip
    paths = {name: data_file.parent / f"{name}.jsonl" for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name] + "\n" if texts[name] else "", encoding="utf-8")
    return paths


def test_processes_that_differ_are_refused_before_step_1(
    shards: dict[str, Path], run_cases: Callable[..., None], tmp_path: Path
) -> None:
    """R12 and R13 in one launch; the last case, a rank without rows, ends the launch."""
    five = {"data": str(shards["five"])}
    refused = {
        "seed": ({}, {"seed": 1}, 6, "the setting seed: rank 0 has 0, rank 1 has 1"),
        "rate": ({}, {"learning_rate": 0.5}, 6, "the setting learning_rate"),
        "layers": ({}, {"layers": "7-9"}, 6, "the setting layers"),
        "initial": ({}, {"fault": "other initial adapter"}, 6, "the initial adapter"),
        "batches": ({}, {"fault": "one batch more"}, 3, "equally many batches: rank 0 has 3, rank 1 has 4"),
        "shards": (five, {"data": str(shards["three"])}, 6, "usable rows: rank 0 has 5, rank 1 has 3"),
        "text": (five, {"data": str(shards["text"])}, 6, "the data"),
        "few": ({"data": str(shards["one"])}, {}, 3, "1 usable rows for 2 processes"),
    }
    cases: list[Any] = [[name, case[0], case[1]] for name, case in refused.items()]
    cases.append(["none", five, {"data": str(shards["none"]), "last": True}])
    with pytest.raises(DataError, match=r"none\.jsonl is empty"):
        run_cases(tmp_path, cases)
    for name, (_, _, code, text) in refused.items():
        for rank in (0, 1):
            error = json.loads((tmp_path / f"{name}-rank-{rank}.error").read_text())
            assert (error["code"], text in error["message"]) == (code, True), (name, rank, error)
        assert not list(tmp_path.glob(f"{name}/train_log.jsonl*")) or name == "batches"
        assert not (tmp_path / name / "adapter_model.safetensors").exists()


def test_a_killed_rank_is_named_and_the_other_ends(run_cases: Callable[..., None], tmp_path: Path) -> None:
    """R11: rank 1 is killed in step 2."""
    cases = [["killed", {"max_steps": 50, "save_steps": 1}, {"fault": "killed"}]]
    with pytest.raises(DistributedError, match=r"rank 1 died \(signal 9, SIGKILL\)"):
        run_cases(tmp_path, cases)
    died = (tmp_path / "killed-rank-1.died").stat().st_mtime
    assert time.time() - died < 15
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    from vfl_train.training.checkpoint import newest_valid

    assert newest_valid(tmp_path / "killed" / "checkpoints").checkpoint is not None


def test_a_rank_that_never_comes_is_named(run_cases: Callable[..., None], tmp_path: Path) -> None:
    """One that is alive and waits for ever, in step 2: found out by --ddp-timeout."""
    cases = [["hangs", {"max_steps": 50, "last": True}, {"fault": "hangs"}]]
    with pytest.raises(DistributedError, match="rank 1 was lost or hangs"):
        run_cases(tmp_path, cases, ddp_timeout=4)
