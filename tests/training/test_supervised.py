"""What the loss does not ask about is not computed, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_vlm
from training_rows import Adapted, largest_difference, rows_of, write_rows
from trl.trainer.utils import add_fused_lm_head

from vfl_train.config import LoraConfig
from vfl_train.data.rows import Row
from vfl_train.errors import ConfigError
from vfl_train.training.adapter import trainable_parameters
from vfl_train.training.frozen import limit_backward
from vfl_train.training.supervised import check_head, pointwise_modules, supervised_only

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "internvl")
LAYERS = "2-3"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows_of(write_rows(tmp_path_factory.mktemp("rows")))


def step(a: Adapted, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per-row loss sums [B] of TRL's fused head, and the gradients of their sum."""
    a.model.zero_grad()
    output = a.model(**batch, use_cache=False, fused_lm_head=True)
    assert int(output.label_mask.sum()) == int((batch["labels"] != -100).sum())
    output.log_probs.sum().backward()
    return output.log_probs.detach().sum(1), {n: p.grad.clone() for n, p in trainable_parameters(a.model)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same(family: str, recompute: bool, rows: list[Row]) -> None:
    a = Adapted(family, LAYERS)
    add_fused_lm_head(a.vlm.base, outputs=("log_probs", "entropy", "is_top1"))
    limit_backward(a.vlm, a.plan, recompute)
    batch = a.collator(rows)
    losses, gradients = step(a, batch)
    seen: list[torch.Size] = []
    mlp = a.vlm.layers[-1].mlp
    with supervised_only(a.vlm):
        handle = mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        ours, found = step(a, batch)
        handle.remove()
    torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-5)
    assert largest_difference(gradients, found) < 1e-5
    most = int((batch["labels"] != -100).sum(1).max())
    assert set(seen) == {torch.Size([1, most * len(rows), a.vlm.hidden_size])} and len(seen) == 1 + recompute


def test_rows_without_supervision_and_forwards_without_labels_run_whole(rows: list[Row]) -> None:
    a = Adapted("qwen2_5_vl", LAYERS)
    add_fused_lm_head(a.vlm.base, outputs=("log_probs",))
    batch = a.collator(rows)
    asked = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        plain = a.model(**asked).logits
        native = a.model(**batch).logits
    with supervised_only(a.vlm), torch.no_grad():
        a.model(**batch, fused_lm_head=True)
        assert torch.equal(a.vlm.base(**asked).logits, plain)
        a.model(**batch, fused_lm_head=True)
        assert torch.equal(a.model(**asked).logits, plain)
        assert torch.equal(a.model(**batch).logits, native)
        blank = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        output = a.model(**blank, fused_lm_head=True)
        assert not output.label_mask.any() and float(output.log_probs.abs().sum()) == 0
    with torch.no_grad():
        assert torch.equal(a.model(**asked).logits, plain)
    assert not any("forward" in module.__dict__ for module in pointwise_modules(a.vlm))


def test_a_model_without_a_body_of_its_own_is_refused() -> None:
    check_head(tiny_vlm("llava"))
    with pytest.raises(ConfigError, match="a llama4 cannot be trained here"):
        check_head(tiny_vlm("llama4"))


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_trains_the_same_adapter(
    make_config: Callable[..., LoraConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    from safetensors.torch import load_file

    from vfl_train.training import supervised
    from vfl_train.training.run import train_lora

    made = []
    for name, around in (("ours", supervised.supervised_only), ("whole", lambda *_: nullcontext())):
        monkeypatch.setattr(supervised, "supervised_only", around)
        folder = train_lora(make_config(tmp_path / name, learning_rate=1e-2, cache_prefix=cache))
        made.append(load_file(folder / "adapter_model.safetensors"))
    assert any(bool(t.any()) for name, t in made[0].items() if "lora_B" in name)
    assert largest_difference(*made) < 1e-3
