"""What sets Emu3 (no vision tower) and Gemma 4 (shared keys and values) apart from other families."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny.gemma4 import TEMPLATE, gemma4
from tiny_models import tiny_vlm

from vfl_train.interventions import Row, drop, knockout, read_out, rerun, uniform
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel

QUESTION = "three cats ?"


def logprobs(vlm: VisionLanguageModel, rows: list[Row], path: str) -> list[tuple[float, ...]]:
    return [found.logprobs for found in read_out(vlm, rows, path)]


@pytest.mark.parametrize("path", ["reference", "engine"])
def test_an_emu3_image_is_written_alike_whatever_shares_its_batch(path):
    """The VQ-VAE normalises over a padded picture as well."""
    vlm = tiny_vlm("emu3")
    small, large = (vlm.prompt(QUESTION, [picture(i, size)]) for i, size in enumerate((32, 64)))
    rows = [Row(prompt, (5, 7), branch) for prompt in (small, large) for branch in ((), drop([1]))]
    together = logprobs(vlm, rows, path)
    for row, found in zip(rows, together, strict=True):
        assert found == pytest.approx(logprobs(vlm, [row], path)[0], abs=2e-5)


def test_a_rerun_of_a_layer_whose_keys_others_read_changes_no_other_row():
    """Layers 2 and 3 read the keys and values of 0 and 1."""
    vlm = tiny_vlm("gemma4_e2b")
    prompt = vlm.prompt(QUESTION, [picture(0)])
    for at in ("itself", "end"):
        branches = [(), rerun([0], at), rerun([1], at), rerun([3], at)]
        rows = [Row(prompt, (5, 7), branch) for branch in branches]
        base, *again = logprobs(vlm, rows, "reference")
        assert base == pytest.approx(logprobs(vlm, rows[:1], "reference")[0], abs=2e-5)
        assert all(abs(found[0] - base[0]) > 1e-3 for found in again)
        assert again[0] == pytest.approx(logprobs(vlm, rows[1:2], "reference")[0], abs=2e-5)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b"])
def test_layers_that_are_out_are_out_on_both_paths(name):
    """Of E2B too: it runs on the reference path, and says so."""
    vlm, cost = tiny_vlm(name), Cost()
    prompt = vlm.prompt(QUESTION, [picture(0)])
    branches = [(), knockout([0]), knockout([1], "mlp"), knockout([3], "both"), uniform([1]), rerun([1])]
    rows = [Row(prompt, (5, 7), branch) for branch in branches]
    reference = logprobs(vlm, rows, "reference")
    engine = [found.logprobs for found in read_out(vlm, rows, "engine", cost=cost)]
    for ours, theirs in zip(engine, reference, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert len({round(found[0], 4) for found in reference}) == len(branches)
    assert cost.reference_rows == (len(rows) if name == "gemma4_e2b" else 0)


def test_drops_on_a_shared_layer_are_that_layers_alone():
    """Layer 3 reads layer 1's keys: dropped at one of them, the other still reads the image."""
    vlm = tiny_vlm("gemma4_e2b")
    prompt = vlm.prompt(QUESTION, [picture(0)])
    rows = [Row(prompt, (5, 7), drop(layers)) for layers in ([1], [3], [1, 3])]
    lower, upper, both = (found[0] for found in logprobs(vlm, rows, "reference"))
    assert min(abs(lower - upper), abs(lower - both), abs(upper - both)) > 1e-3


def test_the_engine_leaves_alone_what_reads_earlier_keys():
    """Also where no embedding for every layer tells it so."""
    model, processor = gemma4(0, TEMPLATE, hidden_size_per_layer_input=0, num_kv_shared_layers=2)
    vlm, cost = VisionLanguageModel(model, processor, "shared"), Cost()
    rows = [Row(vlm.prompt(QUESTION, [picture(0)]), (5, 7), drop([layer])) for layer in range(4)]
    assert len(list(read_out(vlm, rows, "engine", cost=cost))) == cost.reference_rows == 4
    assert set(cost.reasons) == {"decoder layers read keys and values of earlier ones"}


def test_of_gemma4_with_experts_the_attention_alone_is_adapted():
    with torch.device("meta"):
        model, processor = gemma4(
            0, TEMPLATE, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=2, top_k_experts=1,
            moe_intermediate_size=32,
        )  # fmt: skip
    vlm = VisionLanguageModel(model, processor, "26b")
    names = {name.removeprefix(f"{vlm.layer_names[1]}.") for name in vlm.linear_names(1)}
    assert names == {f"self_attn.{part}_proj" for part in "qkvo"}
