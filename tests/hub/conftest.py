"""A tiny base model and adapters on it whose weights are random, written as `vfl-train lora` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vfl_train.config import LoraConfig


@pytest.fixture(scope="session")
def make_adapter(base_folder: Path) -> Callable[..., Path]:
    """Writes an adapter on `layers` to `folder`; B is drawn at random, as if it had been trained."""
    from vfl_train.hub.card import adapter_card
    from vfl_train.hub.privacy import public_values
    from vfl_train.models import VisionLanguageModel
    from vfl_train.runs import RunFolder
    from vfl_train.training.adapter import apply_lora, trainable_parameters
    from vfl_train.training.plan import build_plan, choose_layers
    from vfl_train.training.run import save_adapter_folder

    def make(folder: Path, layers: str, seed: int = 0) -> Path:
        vlm = VisionLanguageModel.load(str(base_folder), device="cpu")
        plan = build_plan(choose_layers(vlm.info, layers=layers), vlm, lora_r=4)
        adapted = apply_lora(vlm.model, plan, r=4, alpha=8, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in trainable_parameters(adapted):
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        config = LoraConfig(model=str(base_folder), layers=layers, data="rows.jsonl", output=folder)
        with RunFolder.open(folder, {"layers": layers, "seed": seed}) as run:
            save_adapter_folder(adapted.eval(), vlm, plan, config, run)
            run.write_json("plan.json", public_values(plan.to_json()))
            run.write_text("README.md", adapter_card(plan, {"seed": seed}, 4, 8))
        return folder

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on layers 3 and 4."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "a", "3-4")


@pytest.fixture(scope="session")
def other_adapter(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on layer 10."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "b.1", "10", seed=1)


@pytest.fixture
def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify reloads in this process: the fresh one costs seconds and has tests of its own."""
    from vfl_train.hub import reload, verify

    monkeypatch.setattr(verify, "reload_in_fresh_process", reload.reload)
