"""What each function's layers are worth to a row: the rise of its answer's loss without them.

One sweep a row over teacher-forced answers: base, one branch a function, and the image dropped at all
layers. `delta_f = loss_f - loss_ref` in nats per answer token; positive: the row needs these layers.
The rows of a text-only sample have nothing to take away: their deltas are 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vfl_train.data.images import RejectedImage, open_image
from vfl_train.data.rows import Reason, Rejected, Row, RowError
from vfl_train.errors import ConfigError, NumericError
from vfl_train.interventions import Branch, Intervention, Prompt, drop, read_out, swap
from vfl_train.interventions import Row as BranchRow
from vfl_train.interventions.readout import Cost
from vfl_train.progress import track

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

CHUNK = 64  # samples whose rows are encoded at a time
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Scores:
    """The measured numbers of one sample. Losses in nats per answer token."""

    row: Row
    n_answer_tokens: int
    loss_full: float
    losses: dict[str, float]
    deltas: dict[str, float]
    visual_gain: float
    flags: tuple[str, ...] = ()


@dataclass
class Scorer:
    """Scores samples under `ablation`; `layers`: the layers of each function."""

    vlm: VisionLanguageModel
    layers: Mapping[str, Sequence[int]]
    ablation: str = "block"
    path: str = "engine"
    batch_tokens: int = 8192
    rejected: list[Rejected] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def branches(self) -> dict[str, Branch]:
        """The branch of each function. `nested`: cumulative drops from the function's first layer on."""
        depth = self.vlm.num_layers
        if self.ablation == "blank":
            return {f: swap(k, "blank") for f, k in self.layers.items()}
        if self.ablation == "knockout":
            return {f: (Intervention("knockout", frozenset(k)),) for f, k in self.layers.items()}
        if self.ablation == "nested":
            return {f: drop(range(min(k), depth)) for f, k in self.layers.items()}
        return {f: drop(k) for f, k in self.layers.items()}

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Scores of all rows that this model can encode, in order; the others go to `rejected`."""
        out: list[Scores] = []
        for start in track(range(0, len(rows), CHUNK), label="scoring"):
            samples = [s for s in map(self._sample, rows[start : start + CHUNK]) if s is not None]
            out += self._score_chunk(samples)
        return out

    def _sample(self, row: Row) -> tuple[Row, Prompt, Prompt | None, tuple[int, ...]] | None:
        """(row, prompt with its answers, the same with blank images if needed, answer positions)."""
        try:
            images = [open_image(ref) for ref in row.images]
            encoded = self.vlm.encoder.encode(row.messages, images)
            prompt = self.vlm.located(encoded.inputs, len(images), encoded.places)
            blank = None
            if self.ablation == "blank" and images:
                blanks = [Image.new("RGB", image.size, GREY) for image in images]
                grey = self.vlm.encoder.encode(row.messages, blanks)
                blank = self.vlm.located(grey.inputs, len(images), grey.places)
        except (RejectedImage, RowError) as e:
            self.rejected.append(Rejected(row.row, row.id, e.code, e.detail, row.line))
            return None
        except ConfigError as e:  # a prompt in which this model's images cannot be told apart
            self.rejected.append(Rejected(row.row, row.id, Reason.not_encodable, e.message, row.line))
            return None
        positions = tuple(torch.nonzero(encoded.answer_mask)[:, 0].tolist())
        if not positions:
            self.rejected.append(
                Rejected(row.row, row.id, Reason.no_answer, "no answer token to score", row.line)
            )
            return None
        return row, prompt, blank, positions

    def _score_chunk(self, samples: list) -> list[Scores]:
        branches = self.branches()
        everything = drop(range(self.vlm.num_layers))
        plan: list[BranchRow] = []
        for row, prompt, blank, positions in samples:
            plan.append(BranchRow(prompt, targets=positions))
            if row.images:
                donors = {} if blank is None else {"blank": blank}
                plan += [
                    BranchRow(prompt, branch=b, donors=donors if _needs_blank(b) else {}, targets=positions)
                    for b in (*branches.values(), everything)
                ]
        found = read_out(self.vlm, plan, self.path, self.batch_tokens, self.cost)
        losses: Iterator[float] = (r.loss for r in found)
        return [self._collect(row, len(positions), losses) for row, _, _, positions in samples]

    def _collect(self, row: Row, answer_tokens: int, losses: Iterator[float]) -> Scores:
        full = _next_finite(losses, row)
        if not row.images:
            zeros = dict.fromkeys(self.layers, 0.0)
            return Scores(
                row, answer_tokens, full, dict.fromkeys(self.layers, full), zeros, 0.0, ("text_only",)
            )
        per_function = {name: _next_finite(losses, row) for name in self.layers}
        gain = _next_finite(losses, row) - full
        deltas = {f: loss - full for f, loss in per_function.items()}
        if self.ablation == "nested":  # each level against the next shallower one
            order = sorted(self.layers, key=lambda f: -min(self.layers[f]))
            reference = full
            for f in order:
                deltas[f] = per_function[f] - reference
                reference = per_function[f]
        return Scores(row, answer_tokens, full, per_function, deltas, gain)


def _next_finite(losses: Iterator[float], row: Row) -> float:
    """Raises NumericError naming the row."""
    try:
        loss = next(losses)
    except NumericError as e:
        raise NumericError(f"row {row.row} of {row.source}: {e.message}", e.fix) from e
    if not math.isfinite(loss):
        raise NumericError(f"the loss of row {row.row} of {row.source} is {loss}", "try --dtype float32")
    return loss


def _needs_blank(branch: Branch) -> bool:
    return any(item.donor == "blank" for item in branch)
