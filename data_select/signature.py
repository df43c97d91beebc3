"""Which function a row looks like, layer by layer.

Where the layers of two functions overlap, as in models that nobody planted functions in, the question which
function's layers a row needs most has no answer: blocks that contain each other are all needed, equal blocks
equally. But each layer taken away alone moves the row's answer by another amount, and the shares of these
movements, the row's *signature*, differ between functions. Probe pairs, whose function is known, show what
the signatures of each function look like; a row goes to the function under which its own is likeliest:
quadratic discriminant analysis with covariances drawn towards the common one's mean variance (Friedman,
Regularized Discriminant Analysis, 1989). A row that needs no function's layers more than most probes need
theirs goes to `language`.

Costs one branch a layer and row, which the engine shares below its layer, and the scoring of some probes.
`scripts/select_truth.py` compares it with the plain rule on labelled pools.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vfl_train.data.rows import ImageRef, Row, assistant_message, user_message
from vfl_train.data_select.choose import CLEAR_ODDS, MIN_CHANGE, Floats, log_odds
from vfl_train.errors import DataError
from vfl_train.schemas import LANGUAGE

if TYPE_CHECKING:
    from vfl_train.functions.probes import ProbeSet

PAIRS = 50  # of a function; both sides of a pair are scored
FEWEST = 20  # probes that a function's covariance is estimated from
KNOWN_LOSS = 1.0  # nats per token; probes that the model does not answer show nothing
SHRINKAGE = 0.2  # weight of the mean variance in a covariance
LEAST_SHARE = 0.02  # of the probes needs less than what counts as a need


def overlapping(layers: Mapping[str, Sequence[int]]) -> bool:
    """Whether two functions share a layer."""
    return any(set(a) & set(b) for a, b in combinations(layers.values(), 2))


def probe_rows(probes: ProbeSet, functions: Sequence[str]) -> list[Row]:
    """Both sides of the first `PAIRS` pairs of each function as rows; the function is their `source`."""
    sides = [
        (name, shown, pair.pair.question, answer)
        for name in functions
        for pair in probes.pairs.get(name, [])[:PAIRS]
        for shown, answer in ((pair.shown_a, pair.pair.answer_a), (pair.shown_b, pair.pair.answer_b))
    ]
    return [
        Row(number, f"probe-{number}", name,
            (user_message(question, len(images), videos=len(videos)), assistant_message(answer)),
            _references(images, number), b"",
            videos=tuple(_references(frames, number) for frames in videos))
        for number, (name, (images, videos), question, answer) in enumerate(sides)
    ]  # fmt: skip


def _references(images: Sequence[Image.Image], number: int) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(None, _png(image), f"probe {number}") for image in images)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def signatures(loss_full: Floats, by_layer: np.ndarray) -> np.ndarray:
    """Of each row the square root of how far each layer moves its answer's log-odds, scaled to length 1 (0
    where nothing moves). `by_layer`: losses without each layer, [n, L]."""
    moved = np.sqrt(np.abs(log_odds(np.asarray(loss_full))[:, None] - log_odds(by_layer)))
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)


class Likeness:
    """The signatures of each function's probes as normal distributions.

    Args:
        function: of each probe, [n] text.
        loss_full, by_layer: as for `signatures`.
        need: how far each function's layers move each probe's answer, {function: [n]}.

    Raises:
        DataError: too few probes of a function that the model answers.
    """

    def __init__(
        self, function: np.ndarray, loss_full: Floats, by_layer: np.ndarray, need: Mapping[str, np.ndarray]
    ) -> None:
        known = np.asarray(loss_full) <= KNOWN_LOSS
        found, self.names = signatures(loss_full, by_layer), list(need)
        groups = []
        for name in self.names:
            mine = found[known & (function == name)]
            if len(mine) < FEWEST:
                raise DataError(
                    f"the model answers {len(mine)} probes of {name}, {FEWEST} are needed to tell its rows",
                    "give more pairs of it (--probes), or --bucket-rule need",
                )
            groups.append(mine)
        within = np.mean([np.trace(np.cov(g.T)) for g in groups]) / found.shape[1]
        self.means = [g.mean(axis=0) for g in groups]
        even = SHRINKAGE * within * np.eye(found.shape[1]) + 1e-9 * np.eye(found.shape[1])
        covariances = [(1 - SHRINKAGE) * np.cov(g.T) + even for g in groups]
        self.precisions = [np.linalg.inv(c) for c in covariances]
        self.volumes = [np.linalg.slogdet(c)[1] for c in covariances]
        largest = np.max(np.stack(list(need.values())), axis=0)[known & np.isin(function, self.names)]
        self.least = min(float(np.quantile(largest, LEAST_SHARE)), CLEAR_ODDS)

    def buckets(
        self,
        loss_full: Floats,
        by_layer: np.ndarray,
        need: Mapping[str, np.ndarray],
        deltas: Mapping[str, Floats],
    ) -> np.ndarray:
        """The bucket of each row, [n] text: `language` where no function's layers move the odds of the answer
        as far as they move most probes', nor its loss noticeably."""
        found = signatures(loss_full, by_layer)
        likely = np.stack(list(self._log_likelihoods(found)), axis=1)
        change = np.max(np.abs(np.stack([deltas[name] for name in self.names])), axis=0)
        felt = np.max(np.stack([need[name] for name in self.names]), axis=0) >= self.least
        felt |= change >= MIN_CHANGE
        names = np.array([*self.names, LANGUAGE])
        return names[np.where(felt, likely.argmax(axis=1), len(self.names))]

    def _log_likelihoods(self, found: np.ndarray) -> Iterator[np.ndarray]:
        for mean, precision, volume in zip(self.means, self.precisions, self.volumes, strict=True):
            away = found - mean
            yield -0.5 * (np.einsum("ij,jk,ik->i", away, precision, away) + volume)
