"""From per-direction outcomes to rates, intervals, peaks and blocks. Plain numbers in and out.

A *direction* is one host image of a pair (a with donor b, b with donor a); both directions of an answered
pair are run, so outcomes come in twos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vfl_train.schemas import wilson

FLIP_SHARE = 0.9  # of what a swap at all layers flips, what a block must flip
PEAK_SHARE = 0.5  # of the peak's change rate, what a layer of the papers' block must reach


def rate(outcomes: Sequence[bool]) -> float:
    """Share of True, 0.0 if there are none."""
    return sum(outcomes) / len(outcomes) if outcomes else 0.0


def clustered_interval(pairs: Sequence[tuple[bool, bool]]) -> list[float]:
    """Wilson 95 % interval of a rate over directions, clustered by pair: the sample size is divided by the
    design effect 1 + rho, rho the intra-pair correlation (1 where it cannot be estimated)."""
    n = 2 * len(pairs)
    if not n:
        return [0.0, 1.0]
    p = sum(a + b for a, b in pairs) / n
    variance = p * (1 - p)
    rho = 1.0
    if variance > 0:
        covariance = sum((a - p) * (b - p) for a, b in pairs) / len(pairs)
        rho = min(1.0, max(0.0, covariance / variance))
    effective = n / (1 + rho)
    return wilson(p * effective, effective)


def peak(change_rate: Sequence[float], flip_rate: Sequence[float], floor: Sequence[float]) -> int | None:
    """Of the layers whose change rate is above their floor the one with the highest (then flip rate, then
    the lowest index), None if there is no such layer."""
    flips = flip_rate or [0.0] * len(change_rate)
    above = [k for k in range(len(change_rate)) if change_rate[k] > floor[k]]
    return max(above, key=lambda k: (change_rate[k], flips[k], -k), default=None)


def papers_block(change_rate: Sequence[float], peak_layer: int | None, floor: Sequence[float]) -> list[int]:
    """The maximal contiguous block around the peak whose layers change at least half as often as the
    peak and more often than the floor."""
    if peak_layer is None:
        return []

    def holds(k: int) -> bool:
        return change_rate[k] >= PEAK_SHARE * change_rate[peak_layer] and change_rate[k] > floor[k]

    low = high = peak_layer
    while low > 0 and holds(low - 1):
        low -= 1
    while high + 1 < len(change_rate) and holds(high + 1):
        high += 1
    return list(range(low, high + 1))


def flip_block(
    joint_flips: Callable[[Sequence[range]], Sequence[float]],
    single: Sequence[float],
    from_layer: Sequence[float],
    up_to_layer: Sequence[float],
) -> tuple[list[int], dict[str, object]]:
    """The smallest contiguous block whose joint swap flips at least 90 % of what all layers flip.

    `single`, `from_layer`, `up_to_layer`: the flip rates of swaps at layer k alone, from k on and up to k,
    one a layer. One layer that flips enough is the block. Else the two cumulative sweeps bound it (flips
    need a layer from `start` on and one up to `stop`), and it is trimmed at both ends while it holds;
    `joint_flips` measures the joint swaps that this takes, several at once. Returns the block (empty if
    swapping all layers flips nothing) and the rates it rests on.
    """
    depth, everywhere = len(single), from_layer[0]
    target = FLIP_SHARE * everywhere - 1e-9  # rates are ratios: forgive their rounding
    found: dict[str, object] = {
        "all_layers": everywhere, "from_layer": list(from_layer), "up_to_layer": list(up_to_layer),
    }  # fmt: skip
    if everywhere == 0:
        return [], found
    alone = max(range(depth), key=lambda k: (single[k], -k))
    if single[alone] >= target:
        return [alone], found | {"block": single[alone]}
    start = max(k for k in range(depth) if from_layer[k] >= target)
    stop = min(k for k in range(depth) if up_to_layer[k] >= target)
    bounds = range(min(start, stop), max(start, stop) + 1)
    block, value = _trim(joint_flips, *_widen(joint_flips, bounds, depth, target), target)
    return list(block), found | {"block": value}


def _widen(
    joint_flips: Callable[[Sequence[range]], Sequence[float]], block: range, depth: int, target: float
) -> tuple[range, float]:
    """Grow by a layer on both sides until the block flips enough (all layers do)."""
    while (value := joint_flips([block])[0]) < target and len(block) < depth:
        block = range(max(0, block.start - 1), min(depth, block.stop + 1))
    return block, value


def _trim(
    joint_flips: Callable[[Sequence[range]], Sequence[float]], block: range, value: float, target: float
) -> tuple[range, float]:
    while len(block) > 1:
        shorter = [range(block.start + 1, block.stop), range(block.start, block.stop - 1)]
        values = joint_flips(shorter)
        best = max(range(2), key=lambda i: values[i])
        if values[best] < target:
            break
        block, value = shorter[best], values[best]
    return block, value


def drop_plan(accuracy: Sequence[float], allowed_points: float) -> dict[str, float]:
    """From which layer on the image can be dropped: the smallest k such that at k and at every larger one
    at most `allowed_points` points of the answers are lost. `accuracy` [L + 1], entry k with the image
    dropped from layer k on, the last one untouched; k = L means that nothing can be dropped."""
    lost = [100 * (accuracy[-1] - a) for a in accuracy]
    k = len(lost) - 1
    while k > 0 and lost[k - 1] <= allowed_points + 1e-9:
        k -= 1
    return {"from_layer": k, "points_lost": lost[k], "allowed_points": allowed_points}
