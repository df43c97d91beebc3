"""Choosing the layer that a task is better off without, or none. Plain numbers in and out.

The choice is the layer with the largest mean margin (ties: the smaller index). TaLo (arXiv 2602.01167) takes
the layer with the highest accuracy on the shots; with ten shots one right answer is ten points, and the best
of L layers is above zero by chance almost always. So three things must hold, else nothing is knocked out:

1. A test on the paired margins, one a shot and layer: sign flips of Wilcoxon's signed ranks, and against the
   largest statistic of all layers (max-T; Westfall and Young, 1993), which accounts for picking the best of
   L. Flipping whole shots keeps how layers go together. Margins count above `MIN_MARGIN` only: a layer that
   makes a right answer a little surer interferes with nothing. Ranks, because layers that a task needs have
   margins a hundred times as large, and under flips they would drown everything else.
2. More shots are answered right than untouched.
3. They are more than always giving the commonest answer would get (binomial test): a model that cannot do the
   task loses its wrong convictions with almost any layer, which raises the margin of every label.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vfl_train.errors import DataError
from vfl_train.functions.matching import normalise
from vfl_train.schemas import wilson

LEVEL = 0.05  # of every test here
MIN_MARGIN = 0.1  # nats an answer token: about a tenth likelier
EXACT_SHOTS = 12  # up to here all sign flips are counted, 4096 of them; beyond, as many are drawn
MIN_SHOTS = 5  # with fewer, no outcome is below the level: 2 ** -4


@dataclass(frozen=True)
class Choice:
    """What was found on the shots. `candidate` has the largest margin, `layer` is it if all tests hold, else
    None and `reason` says why. `interaction` [L] (accuracy, points) and `margin` [L] (nats an answer token)
    are changes against untouched."""

    interaction: list[float]
    margin: list[float]
    accuracy: float
    candidate: int
    p_value: float
    layer: int | None
    reason: str


def draw_shots(answers: Sequence[str], shots: int, rng: np.random.Generator) -> list[int]:
    """`shots` sample indices, at random; if all have the same answer, the last one is exchanged for another.
    Raises DataError where there is no other."""
    classes = [normalise(a) for a in answers]
    if len(set(classes)) < 2:
        raise DataError(
            f"all {len(answers)} answers are the same: {answers[0]!r}",
            "give rows of at least two answers: a layer that makes the model always say one would win",
        )
    order = rng.permutation(len(answers)).tolist()
    chosen, rest = order[:shots], order[shots:]
    if len({classes[i] for i in chosen}) < 2:
        chosen[-1] = next(i for i in rest if classes[i] != classes[chosen[0]])
    return sorted(chosen)


def choose(
    right: np.ndarray, logprob: np.ndarray, answers: Sequence[str], rng: np.random.Generator
) -> Choice:
    """The layer to knock out.

    Args:
        right: bool [shots, 1 + L], whether the answer is right untouched and without each layer.
        logprob: float [shots, 1 + L], nats an answer token, of the labelled answer.
        answers: the labels.
    """
    gains = logprob[:, 1:] - logprob[:, :1]
    correct, margin = right.sum(0), gains.mean(0)
    candidate = int(np.argmax(margin))  # the first of equals
    p_value = max_rank_test(gains - MIN_MARGIN, candidate, rng)
    commonest = max(Counter(map(normalise, answers)).values()) / len(answers)
    hits = int(correct[1 + candidate])
    reason = ""
    if p_value > LEVEL:
        reason = f"the best layer's margin is within chance (p = {p_value:.3f})"
    elif hits <= correct[0]:
        reason = "without the best layer no more shots are answered right"
    elif binomial_tail(hits, len(answers), commonest) > LEVEL:
        reason = "also without the best layer, no more is right than by always giving the commonest answer"
    return Choice(
        interaction=(100 * (correct[1:] - correct[0]) / len(right)).tolist(),
        margin=margin.tolist(),
        accuracy=float(correct[0] / len(right)),
        candidate=candidate,
        p_value=p_value,
        layer=None if reason else candidate,
        reason=reason,
    )


def max_rank_test(gains: np.ndarray, layer: int, rng: np.random.Generator) -> float:
    """p-value that `layer` gains nothing, corrected for all layers. `gains` [shots, L]."""
    shots = len(gains)
    if shots <= EXACT_SHOTS:
        flips = 1 - 2 * (np.arange(2**shots)[:, None] >> np.arange(shots) & 1)  # the first is the identity
    else:
        flips = rng.choice([-1, 1], size=(2**EXACT_SHOTS, shots))
        flips[0] = 1
    signed = np.sign(gains) * _ranks(np.abs(gains))
    statistics = flips @ signed  # [flips, L]
    return float((statistics.max(1) >= statistics[0, layer] - 1e-9).mean())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 within each column of [n, L], equal values sharing their mean rank."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal + 1) / 2


def binomial_tail(hits: int, n: int, share: float) -> float:
    """P(at least `hits` of `n`) at chance `share`."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits, n + 1))


def paired_gain(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, list[float]]:
    """(points gained, its 95 % interval) on the same samples: Newcombe's interval for the difference of
    paired shares (1998, Statistics in Medicine 17, method 10). n > 0."""
    n = len(before)
    both = sum(a and b for a, b in zip(before, after, strict=True))
    lost, won = sum(before) - both, sum(after) - both
    neither = n - both - lost - won
    p, q = sum(after) / n, sum(before) / n
    (p_low, p_high), (q_low, q_high) = wilson(sum(after), n), wilson(sum(before), n)
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    cross: float = both * neither - lost * won
    if cross > 0:  # corrected for continuity
        cross = max(0, cross - n / 2)
    phi = cross / math.sqrt(product) if product else 0.0
    down = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    up = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    low, high = p - q - math.sqrt(max(0.0, down)), p - q + math.sqrt(max(0.0, up))
    return 100 * (p - q), [100 * low, 100 * high]
