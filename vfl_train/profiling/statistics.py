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
    """The layer with the highest change rate (then flip rate, then the lowest index) if it is above the
    floor there, else None."""
    flips = flip_rate or [0.0] * len(change_rate)
    best = max(range(len(change_rate)), key=lambda k: (change_rate[k], flips[k], -k))
    return best if change_rate[best] > floor[best] else None


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
    flips: Callable[[range], float], depth: int, single: Sequence[float]
) -> tuple[list[int], dict[str, object]]:
    """The smallest contiguous block whose joint swap flips at least 90 % of what all layers flip.

    `flips(layers)` measures the flip rate of a joint swap; `single` are the known one-layer rates. Bounded
    by two cumulative sweeps (from k on, up to k), then trimmed at both ends while it holds. Returns the
    block (empty if swapping all layers flips nothing) and what was measured on the way.
    """
    everywhere = flips(range(depth))
    target = FLIP_SHARE * everywhere - 1e-9  # rates are ratios: forgive their rounding
    found: dict[str, object] = {"all_layers": everywhere}
    if everywhere == 0:
        return [], found
    alone = max(range(depth), key=lambda k: (single[k], -k))
    if single[alone] >= target:
        return [alone], found
    from_k = [everywhere] + [flips(range(k, depth)) for k in range(1, depth)]
    up_to_k = [flips(range(k + 1)) for k in range(depth - 1)] + [everywhere]
    found |= {"from_layer": from_k, "up_to_layer": up_to_k}
    start = max(k for k in range(depth) if from_k[k] >= target)
    stop = min(k for k in range(depth) if up_to_k[k] >= target)
    block = _widen(flips, range(min(start, stop), max(start, stop) + 1), depth, target)
    block, value = _trim(flips, block, target)
    return list(block), found | {"block": value}


def _widen(flips: Callable[[range], float], block: range, depth: int, target: float) -> range:
    """Grow by a layer on both sides until the block flips enough (all layers do)."""
    while flips(block) < target:
        block = range(max(0, block.start - 1), min(depth, block.stop + 1))
    return block


def _trim(flips: Callable[[range], float], block: range, target: float) -> tuple[range, float]:
    value = flips(block)
    while len(block) > 1:
        left, right = range(block.start + 1, block.stop), range(block.start, block.stop - 1)
        options = {left: flips(left), right: flips(right)}
        best = max(options, key=lambda b: options[b])
        if options[best] < target:
            break
        block, value = best, options[best]
    return block, value
