"""What each function's layers are worth to a row: the rise of its answer's loss without them.

One sweep a row over teacher-forced answers: base, one branch a function, and the image dropped at all
layers. `delta_f = loss_f - loss_ref` in nats per answer token; positive: the row needs these layers.
The rows of a text-only sample have nothing to take away: their deltas are 0.

Samples are encoded a window at a time (the next one while the model runs), sorted by length inside it and
read in batches of many samples. Windows and batches follow from the rows given to `score` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vfl_train.data.images import RejectedImage, open_image
from vfl_train.data.rows import Reason, Rejected, Row, RowError, reject
from vfl_train.data_select.duplicates import fingerprints
from vfl_train.errors import ConfigError, NumericError
from vfl_train.interventions import Branch, Intervention, Prompt, drop, read_out, swap
from vfl_train.interventions import Row as BranchRow
from vfl_train.interventions.readout import Cost, ReadOut

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

WINDOW = 64  # samples that are encoded and held at a time
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Scores:
    """The measured numbers of one sample. Losses in nats per answer token. `text_key`, `image_hash`: see
    `duplicates.fingerprints`."""

    row: Row
    n_answer_tokens: int
    loss_full: float
    losses: dict[str, float]
    deltas: dict[str, float]
    visual_gain: float
    flags: tuple[str, ...] = ()
    text_key: int = 0
    image_hash: bytes = b""


@dataclass(frozen=True)
class _Sample:
    """An encoded row. `positions`: of its answer tokens. `blank`: the prompt with grey images, if needed."""

    row: Row
    prompt: Prompt
    blank: Prompt | None
    positions: tuple[int, ...]
    keys: tuple[int, bytes]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens up to the last image's end, and all."""
        return (self.prompt.spans[-1][1] if self.prompt.spans else 0), self.prompt.length


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
        """Scores of all rows that this model can encode, in order; the others go to `rejected`. Raises
        NumericError naming the row."""
        out: list[Scores] = []
        windows = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]
        with ThreadPoolExecutor(1) as thread:  # one: fast tokenizers do not serve two threads at a time
            waiting = thread.submit(self._encode, windows[0]) if windows else None
            for following in [*windows[1:], None]:
                samples = waiting.result() if waiting is not None else []
                waiting = thread.submit(self._encode, following) if following is not None else None
                out += self._score_window(samples)
        return out

    # --- encoding --------------------------------------------------------------------------------

    def _encode(self, rows: Sequence[Row]) -> list[_Sample]:
        return [sample for sample in map(self._sample, rows) if sample is not None]

    def _sample(self, row: Row) -> _Sample | None:
        """None: this model cannot encode the row."""
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
            self.rejected.append(reject(row, e))
            return None
        except ConfigError as e:  # a prompt in which this model's images cannot be told apart
            self.rejected.append(reject(row, RowError(Reason.not_encodable, e.message)))
            return None
        positions = tuple(torch.nonzero(encoded.answer_mask)[:, 0].tolist())
        if not positions:
            self.rejected.append(reject(row, RowError(Reason.no_answer, "no answer token to score")))
            return None
        return _Sample(row, prompt, blank, positions, fingerprints(row, images))

    # --- reading ---------------------------------------------------------------------------------

    def _score_window(self, samples: Sequence[_Sample]) -> list[Scores]:
        """In the order of `samples`; they are read in that of their lengths, which saves padding."""
        by_length = sorted(samples, key=lambda s: s.lengths)
        texts = [s for s in by_length if not s.row.images]
        visual = [s for s in by_length if s.row.images]
        found = {s.row.row: scores for s, scores in [*self._of_visual(visual), *self._of_texts(texts)]}
        return [found[s.row.row] for s in samples]

    def _of_texts(self, samples: Sequence[_Sample]) -> Iterator[tuple[_Sample, Scores]]:
        """One plain forward each: there is nothing to take away."""
        plan = [BranchRow(s.prompt, targets=s.positions) for s in samples]
        losses = self._read(plan, samples, "reference")
        for sample in samples:
            full = next(losses)
            same, zeros = dict.fromkeys(self.layers, full), dict.fromkeys(self.layers, 0.0)
            yield sample, self._scores(sample, full, same, zeros, 0.0, ("text_only",))

    def _of_visual(self, samples: Sequence[_Sample]) -> Iterator[tuple[_Sample, Scores]]:
        branches = [(), *self.branches().values(), drop(range(self.vlm.num_layers))]
        plan = [
            BranchRow(
                s.prompt,
                branch=branch,
                donors={"blank": s.blank} if s.blank is not None and _needs_blank(branch) else {},
                targets=s.positions,
            )
            for s in samples
            for branch in branches
        ]
        losses = self._read(plan, samples, self.path)
        for sample in samples:
            full, *of_functions, blind = (next(losses) for _ in branches)
            per_function = dict(zip(self.layers, of_functions, strict=True))
            yield (
                sample,
                self._scores(sample, full, per_function, self._deltas(full, per_function), blind - full),
            )

    def _read(self, plan: Sequence[BranchRow], samples: Sequence[_Sample], path: str) -> Iterator[float]:
        """The loss of each row of `plan`, which holds equally many for each sample. Raises NumericError
        naming the sample's row."""
        found: Iterator[ReadOut] = iter(read_out(self.vlm, plan, path, self.batch_tokens, self.cost))
        for i in range(len(plan)):
            row = samples[i * len(samples) // len(plan)].row
            try:
                loss = next(found).loss
            except NumericError as e:
                raise NumericError(f"row {row.row} of {row.source}: {e.message}", e.fix) from e
            if not math.isfinite(loss):
                raise NumericError(
                    f"the loss of row {row.row} of {row.source} is {loss}", "try --dtype float32"
                )
            yield loss

    def _deltas(self, full: float, per_function: Mapping[str, float]) -> dict[str, float]:
        """Against the untouched model; `nested`: each level against the next shallower one."""
        if self.ablation != "nested":
            return {f: loss - full for f, loss in per_function.items()}
        deltas, reference = {}, full
        for f in sorted(self.layers, key=lambda f: -min(self.layers[f])):
            deltas[f], reference = per_function[f] - reference, per_function[f]
        return {f: deltas[f] for f in per_function}

    def _scores(
        self,
        sample: _Sample,
        full: float,
        losses: dict[str, float],
        deltas: dict[str, float],
        gain: float,
        flags: tuple[str, ...] = (),
    ) -> Scores:
        n = len(sample.positions)
        return Scores(sample.row, n, full, losses, deltas, gain, flags, *sample.keys)


def _needs_blank(branch: Branch) -> bool:
    return any(item.donor == "blank" for item in branch)
