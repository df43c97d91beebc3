"""Two real processes over gloo: DDP, ZeRO-2 and ZeRO-3 resume to the bit and stop together."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import resume_cases as cases
import torch
from safetensors.torch import load_file

from vfl_train.training import launch
from vfl_train.training.run import train_lora

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (extra `deepspeed`)"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]
)
def test_two_processes_resume_to_the_bit_and_stop_together(
    strategy: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3 and R14 in one launch a strategy: five steps with dropout, cut after the second."""
    support = str(Path(__file__).parents[1] / "support")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")])))
    monkeypatch.setattr(launch, "WORKER", "resume_worker")
    train_lora(
        cases.tiny_config(
            tiny, tmp_path / "none", num_processes=2, per_device_train_batch_size=1,
            gradient_accumulation_steps=2, deepspeed=None if strategy == "ddp" else strategy,
        )
    )  # fmt: skip
    found = [json.loads((tmp_path / f"rank-{rank}.found").read_text()) for rank in (0, 1)]
    assert "step-000002" in found[0]["left"] and "step-000003" not in found[0]["left"]
    for its in found:
        assert its["resumed"]["final"] == its["whole"]["final"]
    assert found[0]["resumed"] == found[0]["whole"] and "adapter_model.safetensors" in found[0]["whole"]
    assert {"optimizer.safetensors", "rng.safetensors", "scheduler.json"} <= found[0]["whole"].keys()
    rows = ", ".join(map(str, found[1]["poisoned"]["rows"][-1:]))
    for its in found:
        assert "is not finite at step 3" in its["poisoned"]["message"], its
        assert rows in its["poisoned"]["message"].split("rows")[1]
    saved = [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert not saved
    for path in (tmp_path / "poisoned").rglob("*.safetensors"):
        assert all(bool(torch.isfinite(t.float()).all()) for t in load_file(path).values()), path
