"""From scores to buckets and a budget. Columns of numbers in, row positions out; deterministic, no Python
object a row.

What a row *needs* a function's layers for is measured by the odds of its answer: how far they move, for
better or worse, when these layers lose the image, in nats of log-odds of the answer's mean token. Losses
alone miss the rows whose answer the model would have guessed blind: both losses are near 0, the odds are not.
`scripts/select_truth.py` compares the rules on labelled pools of the phantom's world. For worse counts
because a row that the model misreads at these layers gets better without them, and is the one to learn from.

A row's bucket is the function that it needs most, or `language` if no function's layers move its answer
further than they move anyone's: losing the image somewhere stirs the odds of every answer a little, some
functions' layers more than others. How much is seen on the rows that clearly need another function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vfl_train.schemas import LANGUAGE

MIN_CHANGE = 0.05  # nats of loss by which a function's layers must move a row's answer,
MIN_ODDS = 0.8  # or of log-odds, where too few rows tell what is usual (see `usual`)
CLEAR_ODDS = 3.0  # nats of log-odds, a factor of 20: a row that needs a function this much needs it clearly
USUAL_SHARE = 0.975  # of the rows that clearly need another function lie below what counts as a need
USUAL_ROWS = 100  # from which on such rows tell it
SMALLEST_LOSS = 1e-6  # float32 rounds smaller ones away
SUSPICIOUS_LOSS = 1.0  # nats per token; below it no label is doubted
FENCE = 1.5  # quartile distances above the upper quartile of a bucket's losses: Tukey's fence

Floats = Sequence[float] | np.ndarray


def log_odds(loss: Floats) -> np.ndarray:
    """Log-odds of a probability from its negative logarithm (nats)."""
    clipped = np.maximum(np.asarray(loss, dtype=np.float64), SMALLEST_LOSS)
    return -clipped - np.log(-np.expm1(-clipped))


def needs(losses: Mapping[str, Floats], deltas: Mapping[str, Floats]) -> dict[str, np.ndarray]:
    """How far each function's layers move the odds of each row's answer, [n] each: from the reference's
    loss, `losses - deltas`, to that without them."""
    return {
        name: np.abs(log_odds(np.asarray(losses[name]) - np.asarray(deltas[name])) - log_odds(losses[name]))
        for name in losses
    }


def usual(need: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far each function's layers move answers that do not need them, in nats of log-odds: the quantile
    USUAL_SHARE over the rows that clearly need another function, MIN_ODDS where they are too few."""
    size = _stacked(need)
    best = size.argmax(axis=1)
    clear = size.max(axis=1) >= CLEAR_ODDS
    found = {}
    for k, name in enumerate(need):
        others = size[clear & (best != k), k]
        found[name] = float(np.quantile(others, USUAL_SHARE)) if len(others) >= USUAL_ROWS else MIN_ODDS
    return found


def buckets(need: Mapping[str, np.ndarray], deltas: Mapping[str, Floats]) -> np.ndarray:
    """The bucket of each row: a function of `need` or `language`, [n] text. Equal needs go to the first."""
    names = np.array([*need, LANGUAGE])
    size, least = _stacked(need), np.array(list(usual(need).values()))
    best = size.argmax(axis=1)
    largest = size.max(axis=1)
    change = np.zeros(len(best))
    for k, name in enumerate(need):
        mine = best == k
        change[mine] = np.abs(np.asarray(deltas[name])[mine])
    felt = (largest > 0) & ((largest >= least[best]) | (change >= MIN_CHANGE))
    return names[np.where(felt, best, len(need))]


def _stacked(need: Mapping[str, np.ndarray]) -> np.ndarray:
    """The needs side by side, [n, functions]."""
    return np.stack(list(need.values()), axis=1)


def scores(
    method: str,
    bucket: Sequence[str] | np.ndarray,
    need: Mapping[str, np.ndarray],
    loss_full: Floats,
    visual_gain: Floats,
    seed: int,
) -> np.ndarray:
    """What rows are ranked by, higher first, [n]. `vfl`: the need of the own bucket's layers (0 for
    `language`); `loss`: the full model's loss; `visual-gain`; `random`."""
    if method == "loss":
        return np.asarray(loss_full, dtype=np.float64)
    if method == "visual-gain":
        return np.asarray(visual_gain, dtype=np.float64)
    bucket = np.asarray(bucket)
    if method == "random":
        return np.random.default_rng(seed).permutation(len(bucket)).astype(np.float64)
    out = np.zeros(len(bucket))
    for name, size in need.items():
        out = np.where(bucket == name, size, out)
    return out


def suspicious(bucket: np.ndarray, loss_full: Floats, visual_gain: Floats) -> np.ndarray:
    """Rows whose label is doubted, [n] bool: the untouched model's loss lies far above those of its bucket,
    and seeing the image makes the answer less likely, its odds by more than a factor e. So does a wrong
    label, and so does a picture that the model misreads: such rows are ranked last, not thrown away."""
    loss = np.asarray(loss_full, dtype=np.float64)
    blinder = log_odds(loss) - log_odds(loss + np.asarray(visual_gain)) < -1.0
    high = np.zeros(len(loss), dtype=bool)
    for name in np.unique(bucket):
        mine = bucket == name
        lower, upper = np.quantile(loss[mine], [0.25, 0.75])
        high |= mine & (loss > max(SUSPICIOUS_LOSS, upper + FENCE * (upper - lower)))
    return high & blinder


def pick(
    budget: int,
    bucket: Sequence[str] | np.ndarray,
    score: np.ndarray,
    wanted: Sequence[str],
    mix: Mapping[str, float] | None = None,
    fill: bool = False,
    last: np.ndarray | None = None,
    never: np.ndarray | None = None,
    source: np.ndarray | None = None,
    cap: int | None = None,
) -> np.ndarray:
    """Positions of the picked rows, ascending, at most `budget`.

    Without a `mix` the `wanted` buckets share the budget equally, and what one cannot use goes to the best
    rows left in the others. A `mix` (shares of the budget) is kept to: what a bucket cannot use stays
    unused. `fill`: the best rows of all buckets complete the budget.

    Args:
        last: rows [n] that come behind all others of their bucket.
        never: rows [n] that are not picked at all.
        source, cap: at most `cap` rows of each source (a number [n]).
    """
    bucket = np.asarray(bucket)
    behind = np.zeros(len(bucket), dtype=bool) if last is None else last
    order = np.lexsort((np.arange(len(bucket)), -np.asarray(score, dtype=np.float64), behind))
    if never is not None:
        order = order[~never[order]]
    quotas = dict.fromkeys(wanted, budget // max(1, len(wanted))) if mix is None else _quotas(budget, mix)
    taken = _Taken(len(bucket), budget, source, cap)
    for name in wanted:
        taken.add(order[bucket[order] == name], quotas.get(name, 0))
    if mix is None:
        taken.add(order[np.isin(bucket[order], list(wanted))], budget)
    if fill:
        taken.add(order, budget)
    return np.flatnonzero(taken.rows)


class _Taken:
    """The picked rows so far, [n] bool, under the caps."""

    def __init__(self, n: int, budget: int, source: np.ndarray | None, cap: int | None) -> None:
        self.rows, self.left = np.zeros(n, dtype=bool), budget
        self.source, self.cap = source, cap

    def add(self, candidates: np.ndarray, most: int) -> None:
        """Take at most `most` of the candidates, the first first, and no more than the budget has left."""
        fresh = candidates[~self.rows[candidates]]
        if self.source is not None and self.cap is not None:
            used = np.bincount(self.source[self.rows], minlength=int(self.source.max(initial=0)) + 1)
            mine = self.source[fresh]
            fresh = fresh[_earlier(mine) + used[mine] < self.cap]
        chosen = fresh[: max(0, min(most, self.left))]
        self.rows[chosen] = True
        self.left -= len(chosen)


def _earlier(values: np.ndarray) -> np.ndarray:
    """How often each value stands before its place, [n]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else ordered
    lengths = np.diff(np.r_[starts, len(values)])
    out = np.empty(len(values), dtype=np.int64)
    out[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return out


def _quotas(budget: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Rows of each bucket; what rounding down leaves goes to the largest remainders, so that shares of
    together 1 use the whole budget."""
    quotas = {name: int(budget * share + 1e-9) for name, share in mix.items()}
    left = int(budget * sum(mix.values()) + 1e-9) - sum(quotas.values())
    for name in sorted(mix, key=lambda n: quotas[n] - budget * mix[n])[:left]:
        quotas[name] += 1
    return quotas


def overlap(a: np.ndarray | Sequence[int], b: np.ndarray | Sequence[int]) -> float:
    """Jaccard overlap of two picks, each of different positions."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 1.0
