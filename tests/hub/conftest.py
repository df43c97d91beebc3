"""A tiny base model and adapters on it whose weights are random, written as `vfl-train lora` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, running_hub, talk_to

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
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process talks to."""
    with running_hub() as server:
        talk_to(server, monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify reloads in this process: the fresh one costs seconds and has tests of its own."""
    from vfl_train.hub import reload, verify

    monkeypatch.setattr(verify, "reload_in_fresh_process", lambda *a: {**reload.reload(*a), "ours": []})


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model of a family, as its base repo on the Hub would be."""
    from tiny_models import FAMILIES

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("bases") / f"tiny-{family}"
            model, processor = FAMILIES[family]()
            model.save_pretrained(made[family])
            processor.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def plain_adapter(tiny_base: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """An adapter that plain PEFT trained nothing of: A and B drawn at random, settings of LoraConfig."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    def make(family: str, name: str = "plain", **settings: Any) -> Path:
        base = AutoModelForImageTextToText.from_pretrained(tiny_base(family))
        module = "model.language_model.layers.{}.self_attn.{}"
        modules = [module.format(layer, leaf) for layer in (1, 2) for leaf in ("q_proj", "o_proj")]
        config = {"r": 4, "lora_alpha": 8, "target_modules": modules, "task_type": "CAUSAL_LM", **settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapted = get_peft_model(base, PeftLoraConfig(**config))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def plain_logits(tiny_base: Callable[[str], Path]) -> Callable[..., list[torch.Tensor]]:
    """What plain transformers and plain PEFT make of a family's base and an adapter folder."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vfl_train.hub.samples import next_logits, sample_inputs

    def run(family: str, adapter: Path | None = None) -> list[torch.Tensor]:
        model = AutoModelForImageTextToText.from_pretrained(tiny_base(family))
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        inputs = sample_inputs(AutoProcessor.from_pretrained(tiny_base(family)), 1)
        return next_logits(model.eval(), inputs)

    return run
