"""The rows on which every family's two paths are compared, and how far each is from the truth."""

from __future__ import annotations

import torch
from pictures import picture
from precision import with_float64_decoder

from vfl_train.interventions import BASE, NOISE, Row, drop, read_out, swap
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel

QUESTION = "what text is written here ?"
# Why a variant runs on the reference path though its family's engine runs.
VARIANT_REASONS = {
    "gemma3_short_window": "sliding window",
    "gemma4_e2b": "decoder layers take per_layer_input, which the engine does not know",
}


def one_image(vlm: VisionLanguageModel) -> list[Row]:
    """Single layers, sets from below and to the last, both phases, noise; answers of unequal length."""
    depth = vlm.num_layers
    a, b = (vlm.prompt(QUESTION, [picture(i, 64)]) for i in range(2))
    branches = [BASE, swap([0, depth - 1], NOISE)]
    for phase in ("text", "decode"):
        branches += [edit for k in range(depth) for edit in (drop([k], phase), swap([k], "d", phase))]
        branches += [drop(range(1, depth), phase), swap(range(depth - 1), "d", phase)]
    hosts = ((a, (7, 11, 5), b), (b, (9, 30, 8, 14, 2), a))
    return [Row(host, answer, branch, {"d": donor}) for host, answer, donor in hosts for branch in branches]


def two_images(vlm: VisionLanguageModel) -> list[Row]:
    """Branches on the first, the second and both."""
    host, donor = (vlm.prompt(QUESTION, [picture(i, 64), picture(i + 1, (64, 32))]) for i in (4, 6))
    branches = [BASE]
    for spans in ([0], [1], None):
        branches += [drop([1], spans=spans), swap([0, 2], "d", spans=spans), drop([2], "decode", spans)]
    return [Row(host, (7, 11), branch, {"d": donor}) for branch in branches]


def rows_of(vlm: VisionLanguageModel) -> list[Row]:
    """All of them that the family has prompts for."""
    return [*one_image(vlm), *(two_images(vlm) if vlm.family.several_images else [])]


def logprobs(vlm: VisionLanguageModel, rows: list[Row], path: str, cost: Cost | None = None) -> torch.Tensor:
    """Log-probabilities of all rows' answers, as float64."""
    found = [p for r in read_out(vlm, rows, path, cost=cost) for p in r.logprobs]
    return torch.tensor(found, dtype=torch.float64)


def truth_of(vlm: VisionLanguageModel, rows: list[Row]) -> torch.Tensor:
    """As `logprobs`, of a copy that computes in float64 on the reference path."""
    return logprobs(with_float64_decoder(vlm), rows, "reference")
