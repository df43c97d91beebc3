"""Choosing the layer that a task is better off without, or none. Plain numbers in and out.

The choice is the layer with the largest mean margin (ties: the smaller index). TaLo (arXiv 2602.01167) takes
the layer with the highest accuracy on the shots; with ten shots one right answer is ten points, and the best
of L layers is above zero by chance almost always. So three things must hold, else nothing is knocked out:

1. A test on the paired margins, one a shot and layer. Null: no layer raises the label's log-probability by
   more than `MIN_MARGIN`: what is above it is symmetric about zero. Sign flips of Wilcoxon's signed ranks,
   against the largest statistic of all layers (max-T; Westfall and Young, 1993), which accounts for picking
   the best of L. Flipping whole shots keeps how layers go together. Ranks, because layers that a task needs
   have margins a hundred times as large, and under flips they would drown everything else.
2. The same test on right and wrong answers. Null: without any layer a wrong answer becomes right no more
   often than a right one wrong. A margin alone shows less: a layer without which the model is less sure
   makes every label likelier where it is wrong.
3. A binomial test. Null: the share answered right without the layer is no larger than that of always giving
   the commonest answer, each task its own. A model that cannot do the task loses its wrong convictions with
   almost any layer, which raises the margin of every label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vfl_train.errors import DataError
from vfl_train.functions.matching import matches, normalise
from vfl_train.schemas import wilson

LEVEL = 0.05  # of every test here
MIN_MARGIN = 0.1  # nats an answer token: about a tenth likelier
EXACT_SHOTS = 12  # up to here all sign flips are counted, 4096 of them; beyond, as many are drawn
# Of the 2 ** 5 flips of five shots two reach the largest sum of ranks as soon as one layer gains more than
# MIN_MARGIN nowhere, as most layers do: p = 0.0625, never below the level.
MIN_SHOTS = 6
_OPTION = re.compile(r"([a-z])[.:)] ?\S")  # "b. the car", normalised


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


def draw_shots(
    answers: Sequence[str], shots: int, rng: np.random.Generator, match: str = "exact"
) -> list[int]:
    """`shots` sample indices, at random, every answer as often as its share of the samples has it, to the
    nearest shot; if all have the same answer, the last one is exchanged for another. Raises DataError where
    there is no other."""
    classes = [_class(a, match) for a in answers]
    if len(set(classes)) < 2:
        raise DataError(
            f"all {len(answers)} answers are the same: {answers[0]!r}",
            "give rows of at least two answers: a layer that makes the model always say one would win",
        )
    members: dict[str, list[int]] = {}
    for i in rng.permutation(len(answers)).tolist():
        members.setdefault(classes[i], []).append(i)
    # A class's members lie evenly on [0, 1), so that any beginning holds its share of them.
    places: dict[int, float] = {}
    for mine in members.values():
        offset = rng.random()
        places |= {i: (j + offset) / len(mine) for j, i in enumerate(mine)}
    order = sorted(places, key=places.__getitem__)
    chosen, rest = order[:shots], order[shots:]
    if len({classes[i] for i in chosen}) < 2:
        chosen[-1] = next(i for i in rest if classes[i] != classes[chosen[0]])
    return sorted(chosen)


def _class(answer: str, match: str) -> str:
    """What makes answers the same: the text, of options ("B. the car") the letter."""
    text = normalise(answer)
    option = _OPTION.match(text) if match == "choice" else None
    return option[1] if option else text


def choose(
    right: np.ndarray,
    logprob: np.ndarray,
    answers: Sequence[str],
    rng: np.random.Generator,
    match: str = "exact",
    tasks: Sequence[str] | None = None,
) -> Choice:
    """The layer to knock out.

    Args:
        right: bool [shots, 1 + L], whether the answer is right untouched and without each layer.
        logprob: float [shots, 1 + L], nats an answer token, of the labelled answer.
        answers: the labels.
        match: how answers are judged.
        tasks: the task of each shot; one if not given.
    """
    gains = logprob[:, 1:] - logprob[:, :1]
    correct, margin = right.sum(0), gains.mean(0)
    candidate = int(np.argmax(margin))  # the first of equals
    before, after = right[:, 0].astype(bool), right[:, 1 + candidate].astype(bool)
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p_value = max_rank_test(gains - MIN_MARGIN, candidate, rng)
    p_right = max_flip_test(right[:, 1:].astype(int) - right[:, :1].astype(int), candidate, rng)
    p_constant = binomial_tail(int(after.sum()), len(answers), constant_share(answers, match, tasks))
    reason = ""
    if p_value > LEVEL:
        reason = f"the best layer's margin is within chance (p = {p_value:.3f})"
    elif p_right > LEVEL:
        reason = (
            f"without the best layer not clearly more shots are answered right: {won} won, {lost} lost "
            f"(p = {p_right:.3f})"
        )
    elif p_constant > LEVEL:
        reason = (
            "without the best layer not clearly more right than always giving the commonest answer "
            f"(p = {p_constant:.3f})"
        )
    return Choice(
        interaction=(100 * (correct[1:] - correct[0]) / len(right)).tolist(),
        margin=margin.tolist(),
        accuracy=float(correct[0] / len(right)),
        candidate=candidate,
        p_value=p_value,
        layer=None if reason else candidate,
        reason=reason,
    )


def constant_share(answers: Sequence[str], match: str = "exact", tasks: Sequence[str] | None = None) -> float:
    """The share right of always giving one answer, each task the label that hits most of its own."""
    groups: dict[str, list[str]] = {}
    for answer, task in zip(answers, tasks or [""] * len(answers), strict=True):
        groups.setdefault(task, []).append(answer)
    hits = (max(sum(matches(a, b, match) for b in own) for a in set(own)) for own in groups.values())
    return sum(hits) / len(answers)


def max_rank_test(gains: np.ndarray, layer: int, rng: np.random.Generator) -> float:
    """p-value that `layer` gains nothing, corrected for all layers, by signed ranks. `gains` [shots, L]."""
    return max_flip_test(np.sign(gains) * _ranks(np.abs(gains)), layer, rng)


def max_flip_test(signed: np.ndarray, layer: int, rng: np.random.Generator) -> float:
    """Share of sign flips of whole shots under which the largest column sum reaches that of `layer`.
    `signed` [shots, L]."""
    shots = len(signed)
    if shots <= EXACT_SHOTS:
        flips = 1 - 2 * (np.arange(2**shots)[:, None] >> np.arange(shots) & 1)  # the first is the identity
    else:
        flips = rng.choice([-1, 1], size=(2**EXACT_SHOTS, shots))
        flips[0] = 1
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
