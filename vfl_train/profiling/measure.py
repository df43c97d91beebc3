"""All functions of a probe set on one model: sweep, controls, blocks, drop curves, interaction, cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.functions.probes import LoadedPair, ProbeSet, most_pairs
from vfl_train.interventions import Row, swap
from vfl_train.interventions.generation import generate_under
from vfl_train.models import VisionLanguageModel
from vfl_train.profiling import partial, statistics
from vfl_train.profiling.branches import BASE_KEY, Key, branch_of, single, sweep_keys
from vfl_train.profiling.controls import controls
from vfl_train.profiling.cost import path_taken, record, total
from vfl_train.profiling.interaction import INTERACTION_PAIRS, interaction
from vfl_train.profiling.partial import Measured
from vfl_train.profiling.sweep import (
    DONOR,
    MAX_ANSWER_TOKENS,
    MAX_BOX_TOKENS,
    AnsweredPair,
    Outcome,
    Sweeper,
)
from vfl_train.runs import RunFolder
from vfl_train.schemas import MIN_ANSWERED_PAIRS, FunctionProfile, Profile

if TYPE_CHECKING:
    from vfl_train.config import ProfileConfig

PACKAGES = ("torch", "transformers")
EXAMPLES = 3
Outcomes = dict[Key, list[Outcome]]  # by direction, both of a pair in turn
log = logging.getLogger(__name__)


def measure(
    vlm: VisionLanguageModel, probes: ProbeSet, config: ProfileConfig, run: RunFolder | None = None
) -> Profile:
    """The profile of `vlm` on `probes`. With `run`, every finished function is kept in its folder until all
    are done, and what an earlier attempt kept is not measured again. Raises ConfigError, DataError."""
    sweepers = {n: Sweeper(vlm, config.phase, config.path, config.batch_tokens, n) for n in probes.pairs}
    measured = _kept(run, probes)
    for name, pairs in probes.pairs.items():
        if name not in measured:
            measured[name] = measure_function(sweepers[name], pairs, config)
            log.info("%s: %d rows", name, measured[name].cost.rows)
            if run:
                partial.save(run, name, measured[name])
    measured = {name: measured[name] for name in probes.pairs}
    start = time.perf_counter()
    answered = {name: m.answered for name, m in measured.items()}
    blocks = {name: m.function.flip_block for name, m in measured.items() if m.function.flip_block}
    together = Sweeper(vlm, config.phase, config.path, config.batch_tokens)
    table = interaction(together, answered, blocks)
    seconds = time.perf_counter() - start + sum(m.seconds for m in measured.values())
    cost = record(
        total([together.cost, *(m.cost for m in measured.values())]),
        sum(m.plain for m in measured.values()), seconds,
    )  # fmt: skip
    return _profile(vlm, probes, config, measured, table, cost)


def _kept(run: RunFolder | None, probes: ProbeSet) -> dict[str, Measured]:
    """What an earlier attempt measured; says at which function the run goes on."""
    found = {name: partial.load(run, name, pairs) for name, pairs in probes.pairs.items()} if run else {}
    kept = {name: m for name, m in found.items() if m is not None}
    if kept:
        left = [name for name in probes.pairs if name not in kept]
        where = f"going on at {left[0]}" if left else "going on after the last function"
        print(f"{where}; measured before: {', '.join(kept)}")
    return kept


def _profile(
    vlm: VisionLanguageModel, probes: ProbeSet, config: ProfileConfig, measured: dict[str, Measured],
    table: dict[str, Any], cost: dict[str, Any],
) -> Profile:  # fmt: skip
    versions = {p: metadata.version(p) for p in ("vfl-train", *PACKAGES)}
    curves = {name: m.drop_curve for name, m in measured.items() if m.drop_curve}
    plans = {
        name: statistics.drop_plan(curve["accuracy"], config.drop_points)
        for name, curve in curves.items()
        if measured[name].function.status == "ok"
    }
    return Profile(
        model=vlm.info, intervention=config.intervention, phase=config.phase,
        path=path_taken(config.path, cost), dtype=vlm.dtype, seed=config.seed, versions=versions,
        probe_set={"name": probes.name, "sha256": probes.sha256},
        functions={name: m.function for name, m in measured.items()},
        drop_curve=curves, drop_plan=plans, interaction=table, cost=cost,
        settings={
            "pairs": most_pairs(config.pairs, config.limit), "control_pairs": config.control_pairs,
            "own_probes": config.probes is not None, "drop_points": config.drop_points,
            "answer_tokens": MAX_ANSWER_TOKENS, "box_answer_tokens": MAX_BOX_TOKENS,
            "adapter": config.adapter and Path(config.adapter).name,
            "max_pixels": config.max_pixels, "batch_tokens": config.batch_tokens,
            "peak_share": statistics.PEAK_SHARE, "flip_share": statistics.FLIP_SHARE,
            "interaction_pairs": INTERACTION_PAIRS,
        },
    )  # fmt: skip


# --- one function --------------------------------------------------------------------------------


def measure_function(sweeper: Sweeper, pairs: Sequence[LoadedPair], config: ProfileConfig) -> Measured:
    """Sweep, controls, peak and blocks of one function (design, section 4)."""
    start, depth = time.perf_counter(), sweeper.vlm.num_layers
    answered, outcomes = _sweep(sweeper, pairs, sweep_keys(config.intervention, depth))
    sweep_layers = sweeper.cost.token_layers
    function = _conclude(sweeper, len(pairs), answered, outcomes, config)
    seconds = time.perf_counter() - start
    spent = record(sweeper.cost, sweeper.plain, seconds)
    spent["sweep_forwards"] = sweep_layers / sweeper.plain if sweeper.plain else 0.0
    function.details.update(base_changed=_changed(outcomes[BASE_KEY]), cost=spent)
    curve = _drop_curve(outcomes, depth) if answered and config.intervention != "drop" else {}
    return Measured(function, answered, sweeper.cost, sweeper.plain, seconds, curve)


def _sweep(
    sweeper: Sweeper, pairs: Sequence[LoadedPair], keys: list[Key]
) -> tuple[list[AnsweredPair], Outcomes]:
    """Every branch on both directions of every answered pair."""
    branches = [branch_of(key, sweeper.phase) for key in keys]
    answered: list[AnsweredPair] = []
    outcomes: Outcomes = {key: [] for key in keys}
    for chunk in sweeper.answered(pairs):
        answered += [found for found, _, _ in chunk]
        found = sweeper.outcomes([d for _, *both in chunk for d in both], branches)
        for key, of_key in zip(keys, found, strict=True):
            outcomes[key] += of_key
    return answered, outcomes


def _changed(outcomes: Sequence[Outcome]) -> float:
    return statistics.rate([o.changed for o in outcomes])


def _flipped(outcomes: Sequence[Outcome]) -> float:
    return statistics.rate([o.flipped for o in outcomes])


def _interval(hits: Sequence[bool]) -> list[float]:
    return statistics.clustered_interval(list(zip(hits[::2], hits[1::2], strict=True)))


def _drop_curve(outcomes: Outcomes, depth: int) -> dict[str, Any]:
    """Share of directions still answered right with the image dropped from layer k on; entry L, untouched,
    is 1 because only answered pairs are counted."""
    right = [[o.right for o in outcomes["drop", range(k, depth)]] for k in range(depth)]
    right.append([True] * len(right[0]))
    return {
        "accuracy": [statistics.rate(r) for r in right], "ci95": [_interval(r) for r in right],
        "n": len(right[0]),
    }  # fmt: skip


def _conclude(
    sweeper: Sweeper, pairs: int, answered: list[AnsweredPair], outcomes: Outcomes, config: ProfileConfig
) -> FunctionProfile:
    """What the sweep says, and what must still be asked to say it: controls, joint swaps, examples."""
    depth = sweeper.vlm.num_layers
    kind = "swap" if config.intervention == "swap" else "drop"
    to_last = config.intervention == "drop-from"
    by_layer = [outcomes[kind, range(k, depth) if to_last else single(k)] for k in range(depth)]
    rates = [_changed(o) for o in by_layer]
    intervals = [_interval([x.changed for x in o]) for o in by_layer]
    flips = [_flipped(o) for o in by_layer] if kind == "swap" else []
    if len(answered) < MIN_ANSWERED_PAIRS:  # the rates are kept, with their intervals; nothing is concluded
        return FunctionProfile(
            "not_measurable", pairs, len(answered), rates, flips, intervals, {}, None, [], [], False
        )
    if kind == "drop":
        return _drop_profile(to_last, pairs, len(answered), rates, intervals)
    control, directions = controls(sweeper, answered, config.control_pairs)
    if directions["self"] and not directions["nuisance"]:
        print(f"{sweeper.label}: no answered pairs share question and answer: no nuisance swap in the floor")
    floor = _floor(control, depth)
    peak = statistics.peak(rates, flips, floor)
    block, details = statistics.flip_block(
        lambda sets: _joint_flips(sweeper, answered, sets), flips,
        [_flipped(outcomes["swap", range(k, depth)]) for k in range(depth)],
        [_flipped(outcomes["swap", range(k + 1)]) for k in range(depth)],
    )  # fmt: skip
    return FunctionProfile(
        "ok", pairs, len(answered), rates, flips, intervals, control, peak,
        statistics.papers_block(rates, peak, floor), block, len(block) > depth / 4,
        details | {"control_directions": directions},
        _examples(sweeper, answered[:EXAMPLES], peak),
    )  # fmt: skip


def _joint_flips(sweeper: Sweeper, answered: Sequence[AnsweredPair], sets: Sequence[range]) -> list[float]:
    flipped = sweeper.flips(answered, [swap(layers, DONOR, sweeper.phase) for layers in sets])
    return [statistics.rate(f) for f in flipped]


def _floor(controls: dict[str, list[float]], depth: int) -> list[float]:
    """Per layer the larger of the self-swap and the nuisance swap; 0 where neither was measured."""
    measured = [c for c in (controls.get("self"), controls.get("nuisance")) if c]
    return [max(values) for values in zip(*measured, strict=True)] if measured else [0.0] * depth


def _drop_profile(
    to_last: bool, pairs: int, answered: int, rates: list[float], intervals: list[list[float]]
) -> FunctionProfile:
    """Drops have no donor: no flips, no controls, no flip block (which `distributed` is about). For
    cumulative drops the peak is the largest step."""
    depth, signal = len(rates), rates
    if to_last:
        signal = [c - n for c, n in zip(rates, [*rates[1:], 0.0], strict=True)]
    peak = statistics.peak(signal, [], [0.0] * depth)
    layers = statistics.papers_block(signal, peak, [0.0] * depth)
    return FunctionProfile("ok", pairs, answered, rates, [], intervals, {}, peak, layers, [], False)


def _examples(sweeper: Sweeper, pairs: Sequence[AnsweredPair], peak: int | None) -> list[dict[str, Any]]:
    """What the model says of image a, untouched and with image b read at the peak layer."""
    if peak is None:
        return []
    hosts = [first for chunk in sweeper.again(pairs) for first, _ in chunk]
    branch = swap([peak], DONOR, sweeper.phase)
    said = generate_under(
        sweeper.vlm, [Row(d.host, (), branch, {DONOR: d.donor}) for d in hosts], max(d.cap for d in hosts),
        sweeper.path, sweeper.batch_tokens, sweeper.cost, [(d.own.tokens, d.other.tokens) for d in hosts],
    )  # fmt: skip
    return [
        {
            "pair": found.loaded.line, "question": found.loaded.pair.question,
            "answer_a": found.loaded.pair.answer_a, "answer_b": found.loaded.pair.answer_b,
            "said": found.said_a.text, "said_swapped": sweeper.vlm.decode(tokens),
        }
        for found, tokens in zip(pairs, said, strict=True)
    ]  # fmt: skip
