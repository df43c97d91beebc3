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

from vfl_train.data.rows import Reason, Rejected, Row, RowError, reject
from vfl_train.data.videos import open_row
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
    """The measured numbers of one sample. Losses in nats per answer token; `by_layer`: without each single
    layer, if asked for. `text_key`, `image_hash`: see `duplicates.fingerprints`."""

    row: Row
    n_answer_tokens: int
    loss_full: float
    losses: dict[str, float]
    deltas: dict[str, float]
    visual_gain: float
    flags: tuple[str, ...] = ()
    text_key: int = 0
    image_hash: bytes = b""
    by_layer: tuple[float, ...] = ()


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
    """Scores samples under `ablation`; `layers`: the layers of each function. `by_layer`: take each single
    layer away, too (see `signature`)."""

    vlm: VisionLanguageModel
    layers: Mapping[str, Sequence[int]]
    ablation: str = "block"
    path: str = "engine"
    batch_tokens: int = 8192
    by_layer: bool = False
    rejected: list[Rejected] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def branches(self) -> dict[str, Branch]:
        """The branch of each function. `nested`: cumulative drops from the function's first layer on."""
        if self.ablation == "nested":
            return {f: drop(range(min(k), self.vlm.num_layers)) for f, k in self.layers.items()}
        return {f: self._without(k) for f, k in self.layers.items()}

    def _without(self, layers: Sequence[int]) -> Branch:
        if self.ablation == "blank":
            return swap(layers, "blank")
        if self.ablation == "knockout":
            return (Intervention("knockout", frozenset(layers)),)
        return drop(layers)

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
            images, videos = open_row(row)
            prompt, mask = self._located(row, images, videos)
            blank = None
            if self.ablation == "blank" and row.pictures:
                blank, _ = self._located(row, _grey(images), [_grey(frames) for frames in videos])
        except RowError as e:
            self.rejected.append(reject(row, e))
            return None
        except ConfigError as e:  # a prompt in which this model's images cannot be told apart
            self.rejected.append(reject(row, RowError(Reason.not_encodable, e.message)))
            return None
        positions = tuple(torch.nonzero(mask)[:, 0].tolist())
        if not positions:
            self.rejected.append(reject(row, RowError(Reason.no_answer, "no answer token to score")))
            return None
        pictures = [*images, *(frame for frames in videos for frame in frames)]
        return _Sample(row, prompt, blank, positions, fingerprints(row, pictures))

    def _located(
        self, row: Row, images: list[Image.Image], videos: list[list[Image.Image]]
    ) -> tuple[Prompt, torch.Tensor]:
        """The row as a prompt, and its answer mask [T]."""
        encoded = self.vlm.encoder.encode(row.messages, images, videos)
        count = len(images) + len(videos)
        return self.vlm.located(encoded.inputs, count, encoded.places), encoded.answer_mask

    # --- reading ---------------------------------------------------------------------------------

    def _score_window(self, samples: Sequence[_Sample]) -> list[Scores]:
        """In the order of `samples`; they are read in that of their lengths, which saves padding."""
        by_length = sorted(samples, key=lambda s: s.lengths)
        texts = [s for s in by_length if not s.row.pictures]
        visual = [s for s in by_length if s.row.pictures]
        found = {s.row.row: scores for s, scores in [*self._of_visual(visual), *self._of_texts(texts)]}
        return [found[s.row.row] for s in samples]

    def _of_texts(self, samples: Sequence[_Sample]) -> Iterator[tuple[_Sample, Scores]]:
        """One plain forward each: there is nothing to take away."""
        plan = [BranchRow(s.prompt, targets=s.positions) for s in samples]
        losses = self._read(plan, samples, "reference")
        for sample in samples:
            full = next(losses)
            same, zeros = dict.fromkeys(self.layers, full), dict.fromkeys(self.layers, 0.0)
            each = (full,) * (self.vlm.num_layers if self.by_layer else 0)
            yield sample, self._scores(sample, full, same, zeros, 0.0, each, ("text_only",))

    def _of_visual(self, samples: Sequence[_Sample]) -> Iterator[tuple[_Sample, Scores]]:
        depth, functions = self.vlm.num_layers, self.branches()
        single = [self._without([k]) for k in range(depth)] if self.by_layer else []
        branches = [(), *functions.values(), drop(range(depth)), *single]
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
            full, *found = (next(losses) for _ in branches)
            blind, each = found[len(functions)], tuple(found[len(functions) + 1 :])
            per_function = dict(zip(functions, found, strict=False))
            deltas = self._deltas(full, per_function)
            yield sample, self._scores(sample, full, per_function, deltas, blind - full, each)

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
        by_layer: tuple[float, ...],
        flags: tuple[str, ...] = (),
    ) -> Scores:
        n = len(sample.positions)
        return Scores(sample.row, n, full, losses, deltas, gain, flags, *sample.keys, by_layer)


def _grey(images: Sequence[Image.Image]) -> list[Image.Image]:
    return [Image.new("RGB", image.size, GREY) for image in images]


def _needs_blank(branch: Branch) -> bool:
    return any(item.donor == "blank" for item in branch)
