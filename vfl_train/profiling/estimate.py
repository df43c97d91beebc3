"""What a profile will cost, before it runs: measured on each function's first pair, by the formulas of the
shared-prefix engine.

P prefix tokens (to the end of the image; with phase decode to the last prompt token), S suffix tokens
(question and answer), L layers. A branch that
joins at layer k adds S (L - k) token-layers to the (P + S) L of the base, so a set of branches costs
`1 + S sum(L - k) / ((P + S) L)` plain forwards an image: `1 + S (L + 1) / (2 (P + S))` for the L single
layers, as much again for the sets from layer k on (and for dropping from k on), and S L each for the sets
up to layer k, which start at the bottom. On the reference path every row is one plain forward.

Assumed, for it depends on the model: half of the cumulative swaps are looked at a second time because the
donor's output is possible there. Not in it: joint swaps to trim a block (about one forward an image for each
step, where one layer is not enough) and answers that must be generated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfl_train.functions.probes import LoadedPair, ProbeSet
from vfl_train.interventions import Prompt, Row, read_out
from vfl_train.profiling.branches import first_layers, sweep_keys
from vfl_train.profiling.interaction import INTERACTION_PAIRS
from vfl_train.profiling.sweep import Sweeper
from vfl_train.schemas import PROFILE_CONTROLS

if TYPE_CHECKING:
    from vfl_train.config import ProfileConfig
    from vfl_train.models import VisionLanguageModel


@dataclass(frozen=True)
class Estimate:
    """Of one function, in plain forwards an image. `single`: the one-layer branches; `sweep`: these and the
    cumulative ones; `forwards`: all in. `second`: seconds of one plain forward here."""

    function: str
    pairs: int
    prefix: int
    suffix: int
    rows: int
    single: float
    sweep: float
    forwards: float
    second: float

    @property
    def seconds(self) -> float:
        """Of the whole function; a base output costs about one more forward."""
        return 2 * self.pairs * (self.forwards + 1) * self.second

    def line(self) -> str:
        """One line for --dry-run."""
        return (
            f"{self.function}: {self.pairs} pairs, prompts of {self.prefix} tokens that branches share "
            f"and {self.suffix} of their own; about {self.rows} rows for the price of "
            f"{self.forwards:.1f} plain forwards an image (one-layer sweep {self.single:.1f}, with the "
            f"cumulative ones {self.sweep:.1f}), {self.seconds:.0f} s"
        )


def shared_forwards(prefix: int, suffix: int, depth: int, starts: Sequence[int]) -> float:
    """Plain forwards of the base and of branches that join at `starts`, sharing one prefix."""
    return 1 + suffix * sum(depth - k for k in starts) / ((prefix + suffix) * depth)


def estimate(vlm: VisionLanguageModel, probes: ProbeSet, config: ProfileConfig) -> list[Estimate]:
    """One entry a function. Encodes and runs the first pair of each (two plain forwards), so it also fails
    early where the model cannot take such prompts. Raises ConfigError, DataError naming the line."""
    return [_of_function(vlm, name, pairs, len(probes.pairs), config) for name, pairs in probes.pairs.items()]


def _of_function(
    vlm: VisionLanguageModel, name: str, pairs: Sequence[LoadedPair], functions: int, config: ProfileConfig
) -> Estimate:
    prompt, _ = Sweeper(vlm, config.phase, config.path, config.batch_tokens, name).encode(pairs[0])
    said = vlm.processor.tokenizer(pairs[0].pair.answer_a, add_special_tokens=False)["input_ids"]
    answer = (*said, vlm.eos_token_ids[0])
    # What comes before the first bound token.
    prefix = prompt.spans[-1][1] if config.phase == "text" else prompt.length - 1
    depth, n = vlm.num_layers, len(pairs)
    suffix = prompt.length - prefix + len(answer)
    parts = _parts(config, depth, functions, n)
    rows = sum(share * len(starts) for share, starts, _ in parts)
    if config.path == "reference":
        single, costs = depth + 1.0, [share * len(starts) for share, starts, _ in parts]
    else:
        single = shared_forwards(prefix, suffix, depth, range(depth))
        costs = [
            share * (shared_forwards(prefix, suffix, depth, starts[1:]) + donors * prefix / (prefix + suffix))
            for share, starts, donors in parts
        ]
    seconds = _time_forward(vlm, prompt, answer)
    return Estimate(name, n, prefix, suffix, round(2 * n * rows), single, costs[0], sum(costs), seconds)


def _parts(
    config: ProfileConfig, depth: int, functions: int, pairs: int
) -> list[tuple[float, list[int], int]]:
    """(share of the images, first layer of every branch, further prefixes an image) of every pass: sweep,
    second look, controls, interaction. The first branch stands for the base."""
    sweep = first_layers(sweep_keys(config.intervention, depth))
    if config.intervention != "swap":
        return [(1.0, sweep, 0)]
    cumulative = [k for k in range(1, depth)] + [0] * depth
    control = [k for _ in PROFILE_CONTROLS for k in range(depth)]
    parts = [(1.0, sweep, 0), (1.0, cumulative[::2], 0)]
    parts.append((min(config.control_pairs, pairs) / pairs, control, 3))  # self is a copy, see `controls`
    if functions > 1:
        parts.append((min(INTERACTION_PAIRS, pairs) / pairs, [0] * (2 * functions - 1), 0))
    return parts


def _time_forward(vlm: VisionLanguageModel, prompt: Prompt, answer: tuple[int, ...]) -> float:
    """Seconds of one plain forward of the prompt with an answer, the second of two."""
    for _ in range(2):
        start = time.perf_counter()
        list(read_out(vlm, [Row(prompt, answer)], "reference"))
    return time.perf_counter() - start


def summary(estimates: Sequence[Estimate]) -> str:
    """One line before a run."""
    images = sum(2 * e.pairs for e in estimates)
    forwards = sum(2 * e.pairs * e.forwards for e in estimates)
    rows, seconds = sum(e.rows for e in estimates), sum(e.seconds for e in estimates)
    return (
        f"about {rows} rows on {images} images for the price of {forwards / images:.1f} plain forwards an "
        f"image: {seconds:.0f} s"
    )
