"""The engine against the reference path, on every family, to the rounding of the reference itself.

The truth is a float64 copy on the reference path. In float32 the engine may be at most four times as far
from it as the reference is: both round the same sums in different orders. In bfloat16 its error may be at
most twice the reference's.
"""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from precision import as_dtype, with_float64_decoder
from tiny_models import FAMILIES, LAYERS, VARIANTS, tiny_vlm

from vfl_train.interventions import BASE, NOISE, Row, drop, read_out, swap
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel

QUESTION = "what text is written here ?"
ALL = [*FAMILIES, *VARIANTS]


def branches() -> list:
    """Single layers, cumulative sets from below and above, both phases, noise; many touch the same layer."""
    found = [BASE]
    for phase in ("text", "decode"):
        for k in range(LAYERS):
            found += [drop([k], phase), swap([k], "d", phase)]
        for k in (0, 2):
            found += [drop(range(k, LAYERS), phase), swap(range(k, LAYERS), "d", phase)]
        found += [drop(range(2), phase), swap(range(3), "d", phase), swap([1, 3], NOISE, phase)]
    return found


def one_image_rows(vlm: VisionLanguageModel) -> list[Row]:
    """Hosts that are each other's donors with answers of unequal length, one with another prompt and image
    size and none forced."""
    a, b = (vlm.prompt(QUESTION, [picture(i)]) for i in range(2))
    c, d = (vlm.prompt("three cats, 12 dogs. " + QUESTION, [picture(i, (64, 32))]) for i in range(2, 4))
    rows = []
    for host, answer, donor in ((a, (7, 11, 5), b), (b, (9, 30, 8, 14, 2), a), (c, (), d)):
        rows += [Row(host, answer, branch, {"d": donor}) for branch in branches()]
    return rows


def two_image_rows(vlm: VisionLanguageModel) -> list[Row]:
    """Branches on one of two images, on both, and on each in another way."""
    host, donor = (vlm.prompt(QUESTION, [picture(i), picture(i + 1, (64, 32))]) for i in (4, 6))
    found = [BASE]
    for spans in (None, [0], [1], [0, 1]):
        for phase in ("text", "decode"):
            found += [drop([1], phase, spans), drop(range(LAYERS), phase, spans)]
            found += [swap([2], "d", phase, spans), swap(range(1, 3), NOISE, phase, spans)]
    found += [
        (*drop([1], "decode", [0]), *swap([1], "d", "decode", [1])),
        (*drop([0], spans=[1]), *drop([2], spans=[1])),
    ]
    return [Row(host, (7, 11), branch, {"d": donor}) for branch in found]


ROWS = {"one image": one_image_rows, "two images": two_image_rows}


def logprobs(vlm: VisionLanguageModel, rows: list[Row], path: str, cost: Cost | None = None) -> torch.Tensor:
    found = [p for r in read_out(vlm, rows, path, cost=cost) for p in r.logprobs]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("family", ALL)
def test_engine_is_as_exact_as_the_reference(family, kind):
    vlm = tiny_vlm(family)
    rows = ROWS[kind](vlm)
    truth = logprobs(with_float64_decoder(vlm), rows, "reference")
    reference, engine = (logprobs(vlm, rows, path) for path in ("reference", "engine"))
    allowed = 4 * (reference - truth).abs().max() + 2**-23 * truth.abs().max()
    assert (engine - truth).abs().max() <= allowed
    base = truth[: len(rows[0].answer)]
    assert (truth[len(base) : 2 * len(base)] - base).abs().max() > 1000 * allowed, "a drop is not felt"


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("family", ALL)
def test_engine_says_what_the_reference_says(family, kind):
    vlm = tiny_vlm(family)
    rows = ROWS[kind](vlm)
    rows += [Row(r.prompt, (), r.branch, r.donors) for r in rows[: len(branches())]]
    for ours, theirs in zip(read_out(vlm, rows, "engine"), read_out(vlm, rows, "reference"), strict=True):
        assert (ours.predicted, ours.greedy, ours.next_token) == (
            theirs.predicted, theirs.greedy, theirs.next_token,
        )  # fmt: skip


@pytest.mark.parametrize("family", ALL)
def test_order_and_batch_size_do_not_matter(family):
    vlm = tiny_vlm(family)
    rows = one_image_rows(vlm)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    at_once = list(read_out(vlm, rows, "engine"))
    for found, i in zip(read_out(vlm, [rows[i] for i in order], "engine", 600), order, strict=True):
        assert found.logprobs == pytest.approx(at_once[i].logprobs, abs=2e-5)
        assert found.predicted == at_once[i].predicted


@pytest.mark.parametrize("family", FAMILIES)
def test_single_image_sweeps_need_no_reference_rows(family):
    vlm, cost = tiny_vlm(family), Cost()
    rows = one_image_rows(vlm)
    logprobs(vlm, rows, "engine", cost)
    assert (cost.rows, cost.reference_rows, cost.reasons) == (len(rows), 0, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_text_between_images_is_the_references_work(family):
    vlm, cost = tiny_vlm(family), Cost()
    rows = two_image_rows(vlm)
    logprobs(vlm, rows, "engine", cost)
    between = [
        any(i.phase == "text" and (i.spans is None or 0 in i.spans) for i in row.branch) for row in rows
    ]
    assert cost.reference_rows == sum(between) > 0
    assert all("between images" in reason for reason in cost.reasons)


def test_a_window_shorter_than_the_prompt_is_the_references_work():
    vlm, cost = tiny_vlm("gemma3_short_window"), Cost()
    rows = one_image_rows(vlm)
    logprobs(vlm, rows, "engine", cost)
    assert cost.reference_rows == len(rows)
    assert all("sliding window" in reason for reason in cost.reasons)


@pytest.mark.parametrize("family", ALL)
def test_bfloat16_error_is_of_the_references_size(family):
    """Root mean square over rows and models, against float32 on the same rounded weights."""
    squares = {"engine": 0.0, "reference": 0.0}
    for seed in range(3):
        model, processor = {**FAMILIES, **VARIANTS}[family](seed)
        half = as_dtype(VisionLanguageModel(model, processor, family), torch.bfloat16)
        full = as_dtype(half, torch.float32)
        rows = one_image_rows(half)
        truth = logprobs(full, rows, "reference")
        for path in squares:
            squares[path] += float((logprobs(half, rows, path) - truth).square().sum())
    assert squares["engine"] <= 2**2 * squares["reference"]
