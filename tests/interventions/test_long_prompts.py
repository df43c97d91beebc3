"""Prompts of 10,000 tokens: what memory both paths take beside the model, and that the numbers are right."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from pictures import picture
from tiny_models import LAYERS, tiny_vlm

from vfl_train.data.rows import Image, Message, Text
from vfl_train.interventions import Row, drop, read_out, reference, swap
from vfl_train.models.memory import peak_memory, start_of_peak

CPU = torch.device("cpu")
ANSWER = (7, 11, 5)


def long_prompt(vlm, tokens: int, seed: int = 0, image_first: bool = False):
    """About `tokens` tokens of text before an image and a question (or after an image)."""
    once, many = (len(vlm.processor.tokenizer("dogs. " * n)["input_ids"]) for n in (1, 101))
    text = Text("dogs. " * (100 * tokens // (many - once)))
    parts = (Image(0), text) if image_first else (text, Image(0), Text("who ?"))
    return vlm.prompt_of([Message("user", parts)], [picture(seed)])


def bytes_taken(work) -> tuple[list, int]:
    """What `work` returns, and the most memory in use meanwhile beyond what was at its start."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    before = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))
    start_of_peak(CPU)
    found = list(work())
    return found, peak_memory(CPU) - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
@pytest.mark.parametrize("image_first", [False, True], ids=["image last", "image first"])
def test_ten_thousand_tokens_run_in_the_stated_memory(image_first):
    """The reference path: a mask of one byte a pair, with a copy or two while it is made, 64 MB of it widened
    at a time. The engine: no mask at all where attention is causal."""
    vlm = tiny_vlm("internvl")
    prompt = long_prompt(vlm, 10_000, image_first=image_first)
    assert 9_900 < prompt.length < 10_100
    assert (prompt.spans[0][0] < 100) == image_first
    row = Row(prompt, ANSWER, drop([1]))
    (theirs,), masks = bytes_taken(lambda: read_out(vlm, [row], "reference"))
    (ours,), none = bytes_taken(lambda: read_out(vlm, [row], "engine"))
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert masks < 4 * prompt.length**2, f"{masks / 2**20:.0f} MB"
    assert none < 2 * prompt.length**2, f"{none / 2**20:.0f} MB"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "gemma3_short_window"])
@pytest.mark.parametrize("pairs", [1, 1000])
def test_stretches_of_queries_change_nothing(family, pairs, monkeypatch):
    """From one query at a time on; dropped, swapped and plain rows, with padding between them."""
    vlm = tiny_vlm(family)
    host, donor = (long_prompt(vlm, 30, seed) for seed in (0, 1))
    rows = [Row(host, ANSWER), Row(vlm.prompt("who ?", [picture(2)]), (9,), drop([2]))]
    for layers in ([1], range(LAYERS)):
        rows += [Row(host, ANSWER, drop(layers)), Row(host, ANSWER, swap(layers, "d"), {"d": donor})]
    whole = list(read_out(vlm, rows, "reference"))
    assert len(rows) * host.length**2 < reference.PAIRS_AT_A_TIME
    monkeypatch.setattr(reference, "PAIRS_AT_A_TIME", pairs)
    for a, b in zip(read_out(vlm, rows, "reference"), whole, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)
