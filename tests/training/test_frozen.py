"""Backward visits what is trained and what lies above it; nothing else is visited, kept or run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backward_visits import watch
from tiny_models import LAYERS
from training_rows import Adapted, largest_difference, rows_of, write_rows

from vfl_train.config import LoraConfig
from vfl_train.data.rows import Row
from vfl_train.errors import ConfigError
from vfl_train.training.frozen import limit_backward, lowest_trained

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3")
VISITED = [f"layer {i}" for i in range(2, LAYERS)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows_of(write_rows(tmp_path_factory.mktemp("rows")))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_below_is_visited_or_kept(family: str, recompute: bool, rows: list[Row]) -> None:
    a = Adapted(family, "2")
    batch = a.collator(rows)
    plain = a.gradients(batch)
    limit_backward(a.vlm, a.plan, recompute)
    with watch(a.vlm) as seen:
        ours = a.gradients(batch)
    assert seen.backward == Counter(VISITED)
    assert seen.below(2) == Counter()
    assert all(seen.forward[name] == 1 + recompute for name in VISITED)
    assert seen.forward["layer 0"] == seen.forward["layer 1"] == 1
    assert largest_difference(plain, ours) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_keeps_less(family: str, rows: list[Row]) -> None:
    kept = []
    for recompute in (False, True):
        a = Adapted(family, "2-3")
        limit_backward(a.vlm, a.plan, recompute)
        with watch(a.vlm) as seen:
            a.gradients(a.collator(rows))
        kept.append(sum(seen.kept[name] for name in VISITED))
    assert kept[1] < kept[0] / 5


def test_deep_stack_above_the_lowest_layer(rows: list[Row]) -> None:
    """Image features are added after layer 1, which is trained: they take no gradient to the tower."""
    a = Adapted("qwen3_vl", "1")
    limit_backward(a.vlm, a.plan, recompute=True)
    with watch(a.vlm) as seen:
        a.gradients(a.collator(rows))
    assert seen.backward == Counter(["layer 1", *VISITED]) and seen.below(1) == Counter()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_that_require_grad_change_nothing(family: str, rows: list[Row]) -> None:
    """What transformers, PEFT and TRL do where checkpointing is on or weights are quantized."""
    a = Adapted(family, "2")
    a.model.enable_input_require_grads()
    batch = a.collator(rows)
    with watch(a.vlm) as spoiled:
        plain = a.gradients(batch)
    assert spoiled.backward["layer 0"] == 1  # the trap is real
    limit_backward(a.vlm, a.plan)
    with watch(a.vlm) as seen:
        ours = a.gradients(batch)
    assert seen.backward == Counter(VISITED)
    assert largest_difference(plain, ours) < 1e-6


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_go_through_where_the_tower_is_trained(recompute: bool, rows: list[Row]) -> None:
    a = Adapted("qwen2_5_vl", "2", extra=("model.visual.blocks.0.attn.proj",))
    assert lowest_trained(a.vlm, a.plan) is None
    batch = a.collator(rows)
    plain = a.gradients(batch)
    limit_backward(a.vlm, a.plan, recompute)
    with watch(a.vlm) as seen:
        ours = a.gradients(batch)
    assert seen.backward["layer 0"] == 1 and seen.backward["vision"] > 0
    assert all(float(g.norm()) > 0 for g in ours.values())
    assert largest_difference(plain, ours) < 1e-5
    assert seen.forward["layer 0"] == 1 + recompute


def test_layers_that_cannot_be_recomputed_are_refused() -> None:
    a = Adapted("llava", "2")
    a.vlm.layers[3] = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"llava \(Identity\) cannot be recomputed"):
        limit_backward(a.vlm, a.plan, recompute=True)


def test_a_run_with_recomputation_trains_the_same_adapter(
    make_config: Callable[..., LoraConfig], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from vfl_train.training.run import train_lora

    made = []
    for recompute in (False, True):
        folder = train_lora(
            make_config(tmp_path / str(recompute), activation_checkpointing=recompute, learning_rate=1e-2)
        )
        made.append(load_file(folder / "adapter_model.safetensors"))
    assert any(bool(t.any()) for name, t in made[0].items() if "lora_B" in name)
    assert largest_difference(*made) < 1e-4
