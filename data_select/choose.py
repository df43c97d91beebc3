"""From scores to buckets and a budget. Plain numbers in, row positions out; deterministic.

A row's bucket is the function whose layers it needs most, each function's delta measured in units of its
own 95th percentile in the pool: raw nats would favour functions whose answers are long shots without the
image, ranks would favour noise where a function is rare. Rows that lose little without any image go to
`language`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vfl_train.schemas import LANGUAGE

MIN_GAIN = 0.1  # nats per answer token that a row must lose without the image to count as visual
SCALE_QUANTILE = 0.95


def normalised(deltas: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """Deltas of each function in units of the 95th percentile of its positive deltas."""
    out = {}
    for name, values in deltas.items():
        array = np.asarray(values, dtype=np.float64)
        positive = array[array > 0]
        scale = float(np.quantile(positive, SCALE_QUANTILE)) if len(positive) else 1.0
        out[name] = array / max(scale, 1e-3)
    return out


def buckets(deltas: Mapping[str, Sequence[float]], visual_gain: Sequence[float]) -> list[str]:
    """The bucket of each row: a function of `deltas` or `language`."""
    names, units = list(deltas), normalised(deltas)
    table = np.stack([units[n] for n in names], axis=1)
    best = table.argmax(axis=1)
    visual = (np.asarray(visual_gain) >= MIN_GAIN) & (table.max(axis=1) > 0)
    return [names[b] if v else LANGUAGE for b, v in zip(best, visual, strict=True)]


def scores(
    method: str,
    bucket: Sequence[str],
    deltas: Mapping[str, Sequence[float]],
    loss_full: Sequence[float],
    visual_gain: Sequence[float],
    seed: int,
) -> np.ndarray:
    """What rows are ranked by, higher first, [n]. `vfl`: the delta of the row's own bucket in its units
    (0 for `language`); `loss`: the full model's loss; `visual-gain`; `random`."""
    n = len(bucket)
    if method == "loss":
        return np.asarray(loss_full, dtype=np.float64)
    if method == "visual-gain":
        return np.asarray(visual_gain, dtype=np.float64)
    if method == "random":
        return np.random.default_rng(seed).permutation(n).astype(np.float64)
    units = normalised(deltas)
    return np.array([0.0 if b == LANGUAGE else units[b][i] for i, b in enumerate(bucket)])


def pick(
    budget: int,
    bucket: Sequence[str],
    score: np.ndarray,
    wanted: Sequence[str],
    mix: Mapping[str, float] | None = None,
    fill: bool = False,
) -> list[int]:
    """Positions of the picked rows, ascending, at most `budget`.

    The budget is shared between the `wanted` buckets by `mix` (or equally); what one bucket cannot use
    goes to the best rows left in the others. `fill`: rows of other buckets complete it by score.
    """
    order = sorted(range(len(bucket)), key=lambda i: (-score[i], i))
    shares = mix or dict.fromkeys(wanted, 1 / max(1, len(wanted)))
    chosen: set[int] = set()
    for name in wanted:
        quota = int(budget * shares.get(name, 0.0) + 1e-9)
        chosen.update([i for i in order if bucket[i] == name][:quota])
    for allowed in ([i for i in order if bucket[i] in wanted], order if fill else []):
        for i in allowed:
            if len(chosen) >= budget:
                break
            if mix is None or allowed is order:
                chosen.add(i)
    return sorted(chosen)


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Jaccard overlap of two picks."""
    both, either = set(a) & set(b), set(a) | set(b)
    return len(both) / len(either) if either else 1.0
