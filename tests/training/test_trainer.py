"""Training itself: what backward visits, what stops a run, what makes it repeatable."""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from vfl_train.config import LoraConfig
from vfl_train.data.collator import Collator
from vfl_train.data.readers import read_dataset
from vfl_train.errors import DataError, NumericError
from vfl_train.models import VisionLanguageModel
from vfl_train.training.adapter import apply_lora, trainable_parameters
from vfl_train.training.plan import build_plan, choose_layers
from vfl_train.training.trainer import train, training_arguments

MakeConfig = Callable[..., LoraConfig]


class Bench:
    """A loaded model with LoRA on it, the rows, and a way to train."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.vlm = VisionLanguageModel.load(config.model, device="cpu")
        choice = choose_layers(self.vlm.info, layers=config.layers)
        self.plan = build_plan(choice, self.vlm, config.lora_r)
        self.model: PeftModel = apply_lora(self.vlm.model, self.plan, r=16, alpha=32)
        self.rows = read_dataset(Path(config.data)).rows
        self.collate: Callable[..., dict[str, Any]] = Collator(self.vlm.encoder)
        self.seen: list[list[int]] = []
        self.log = Path(config.output) / "log.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def train(self) -> dict[str, float]:
        def collate(rows: list) -> dict[str, Any]:
            self.seen.append([row.row for row in rows])
            return self.collate(rows)

        return train(self.model, self.vlm.processor, self.rows, collate, self.config, self.log)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for _, p in trainable_parameters(self.model)]

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def bench(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Bench]:
    return lambda **changes: Bench(make_config(tmp_path / str(len(list(tmp_path.iterdir()))), **changes))


def count_backward(bench: Bench) -> Counter[str]:
    """Backward visits of every decoder layer and vision block."""
    visits: Counter[str] = Counter()
    layers = {f"layer {i}": m for i, m in enumerate(bench.vlm.layers)}
    blocks = {f"vision {i}": m for i, m in enumerate(bench.vlm.model.model.visual.blocks)}
    for name, module in {**layers, **blocks}.items():
        module.register_full_backward_hook(lambda *_, name=name: visits.update([name]))
    return visits


@pytest.mark.parametrize("layers", ["7-8,10", "11", "0"])
def test_backward_stops_at_the_lowest_adapted_layer(bench: Callable[..., Bench], layers: str) -> None:
    b = bench(layers=layers, max_steps=2)
    visits = count_backward(b)
    b.train()
    assert visits == {f"layer {i}": 2 for i in range(b.plan.lowest_layer, 12)}


def test_only_planned_parameters_move(bench: Callable[..., Bench]) -> None:
    b = bench(max_steps=4)
    before = {name: p.detach().clone() for name, p in b.model.named_parameters()}
    b.train()
    moved = {name for name, p in b.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, _ in trainable_parameters(b.model)}


def test_the_loss_is_the_mean_over_all_answer_tokens_of_a_step(bench: Callable[..., Bench]) -> None:
    b = bench(max_steps=1, learning_rate=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    logged = b.train()["train_loss"]
    total, tokens = 0.0, 0
    for group in b.seen[:3]:
        batch = b.collate([b.rows[i] for i in group])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = b.model(**batch, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total, tokens = total + losses.item(), tokens + int((labels != -100).sum())
    assert logged == pytest.approx(total / tokens, rel=1e-5)


def test_the_same_seed_gives_the_same_adapter_and_order(bench: Callable[..., Bench]) -> None:
    a, b, c = bench(max_steps=3), bench(max_steps=3), bench(max_steps=3, seed=1)
    for each in (a, b, c):
        each.train()
    assert a.seen == b.seen != c.seen
    assert all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights(), strict=True))
    assert sorted(a.seen[0]) != a.seen[0] or sorted(a.seen[1]) != a.seen[1]


def test_an_epoch_sees_every_row_once(bench: Callable[..., Bench]) -> None:
    b = bench(max_steps=-1, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    b.train()
    assert sorted(row for batch in b.seen for row in batch) == list(range(24))


def test_training_lowers_the_loss_and_says_so(bench: Callable[..., Bench], capfd) -> None:
    b = bench(max_steps=12, layers="0-11", learning_rate=5e-3, per_device_train_batch_size=8)
    capfd.readouterr()
    b.train()
    entries = b.entries()
    losses = [e["loss"] for e in entries if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 13))
    printed = capfd.readouterr()
    assert printed.out == ""  # no progress bar, no printed dictionaries
    assert "it/s" not in printed.err and "Warning" not in printed.err


def test_forward_is_given_back(bench: Callable[..., Bench]) -> None:
    b = bench(max_steps=1)
    b.train()
    batch = b.collate(b.rows[:2])
    output = b.model(**batch)
    assert output.logits.shape[:2] == batch["input_ids"].shape
    assert not b.model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_the_rows(
    bench: Callable[..., Bench], value: float
) -> None:
    b = bench(max_steps=4, gradient_accumulation_steps=2)
    inner = b.collate
    bad: list[int] = []

    def poisoned(rows: list) -> dict[str, Any]:
        batch = inner(rows)
        if len(b.seen) == 4:  # second micro-batch of the second step
            batch["pixel_values"][:] = value
            bad.extend(row.row for row in rows)
        return batch

    b.collate = poisoned
    with pytest.raises(NumericError) as raised:
        b.train()
    assert f"step 2, in the batch of rows {', '.join(map(str, bad))}" in raised.value.message
    assert all(bool(torch.isfinite(w).all()) for w in b.weights())
    assert "NaN" not in b.log.read_text()


def test_a_gradient_that_is_not_finite_stops(bench: Callable[..., Bench]) -> None:
    b = bench(max_steps=3)
    parameter = trainable_parameters(b.model)[5][1]
    calls: list[int] = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("nan") if len(calls) == 2 else gradient

    parameter.register_hook(poison)
    with pytest.raises(NumericError, match="gradient is not finite at step 2"):
        b.train()
    assert all(bool(torch.isfinite(w).all()) for w in b.weights())


def test_a_planned_module_without_gradient_stops_the_first_step(bench: Callable[..., Bench]) -> None:
    b = bench()
    dead = "layers.8.mlp.up_proj.lora_B"
    parameter = next(p for name, p in trainable_parameters(b.model) if dead in name)
    parameter.register_hook(torch.zeros_like)
    with pytest.raises(NumericError, match=r"layers\.8\.mlp\.up_proj\.lora_B"):
        b.train()


def test_no_rows_is_a_data_error(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.rows = []
    with pytest.raises(DataError, match="no rows"):
        b.train()


def test_training_opens_no_connection(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: tried.append(a))
    monkeypatch.delenv("CI", raising=False)
    bench(max_steps=1).train()
    assert not tried


def test_the_bar_is_silent_when_not_a_terminal(make_config: MakeConfig, tmp_path: Path, monkeypatch) -> None:
    config, cpu = make_config(tmp_path), torch.device("cpu")
    assert training_arguments(config, cpu, str(tmp_path)).disable_tqdm
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = training_arguments(config, cpu, str(tmp_path))
    assert not arguments.disable_tqdm
    assert not arguments.gradient_checkpointing and not arguments.bf16
    assert arguments.max_length is None and arguments.report_to == []
