"""`vfl-train profile`: find the layers at which a model reads each function out of the image."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vfl_train.errors import DataError
from vfl_train.functions.probes import LoadedPair, ProbeSet, builtin_probe_set, load_probe_set
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.options import format_layers
from vfl_train.profiling import statistics
from vfl_train.profiling.sweep import Sweeper
from vfl_train.report.heatmap import save_heatmap
from vfl_train.report.pages import profile_page
from vfl_train.runs import RunFolder, fingerprint
from vfl_train.schemas import MIN_ANSWERED_PAIRS, FunctionProfile, Profile

if TYPE_CHECKING:
    from vfl_train.config import ProfileConfig

log = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers")


def profile(config: ProfileConfig) -> Profile:
    """Profile the model of `config` and write profile.json, profile.png and report.html. Prints the layers
    found. Raises ConfigError, DataError (exit codes 2, 3)."""
    probes = load_probes(config)
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, config.device, config.load_in_4bit,
        config.max_pixels, config.adapter,
    )  # fmt: skip
    _check_grids(vlm, probes)
    if config.dry_run:
        return _estimate(vlm, probes, config)
    inputs = {"probe_set": probes.sha256, "model": model_digest(vlm)}
    with RunFolder.open(
        config.output, fingerprint("profile", config, inputs, PACKAGES), config.overwrite
    ) as run:
        if run.already_done:
            print(f"already done: {run.folder}")
            return Profile.load(run.folder)
        found = measure(vlm, probes, config)
        run.write_json("profile.json", found.to_json())
        with run.replacing("profile.png") as path:
            save_heatmap(found, path)
        run.write_text("report.html", profile_page(found, probes))
    _print(found)
    return found


def load_probes(config: ProfileConfig) -> ProbeSet:
    """The probe set that `config` asks for, at most `pairs` a function."""
    pairs = config.pairs if config.limit is None else min(config.pairs, config.limit)
    if config.probes is None:
        return builtin_probe_set(config.model, config.functions, pairs, config.seed)
    return load_probe_set(Path(config.probes), config.functions, pairs)


def _check_grids(vlm: VisionLanguageModel, probes: ProbeSet) -> None:
    """One prompt of each function: fails early where the model cannot take such prompts."""
    for pairs in probes.pairs.values():
        first = pairs[0]
        a, b = (vlm.prompt(first.pair.question, [i]) for i in (first.image_a, first.image_b))
        if a.grids != b.grids:
            raise DataError(f"line {first.line}: the images get unequal grids {a.grids} and {b.grids}")


def measure(vlm: VisionLanguageModel, probes: ProbeSet, config: ProfileConfig) -> Profile:
    """All functions of `probes` on `vlm`."""
    functions = {}
    for name, pairs in probes.pairs.items():
        sweeper = Sweeper(vlm, config.phase, config.path, config.batch_tokens, name)
        functions[name] = measure_function(sweeper, pairs, config)
        log.info("%s: %d rows", name, sweeper.rows_run)
    versions = {p: metadata.version(p) for p in ("vfl-train", *PACKAGES)}
    return Profile(
        model=vlm.info, intervention=config.intervention, phase=config.phase, path=config.path,
        dtype=vlm.dtype, seed=config.seed, versions=versions,
        probe_set={"name": probes.name, "sha256": probes.sha256}, functions=functions,
        settings={
            "pairs": config.pairs, "control_pairs": config.control_pairs,
            "adapter": config.adapter and Path(config.adapter).name,
            "peak_share": statistics.PEAK_SHARE, "flip_share": statistics.FLIP_SHARE,
        },
    )  # fmt: skip


def measure_function(sweeper: Sweeper, pairs: list[LoadedPair], config: ProfileConfig) -> FunctionProfile:
    """Sweep, controls, peak and blocks of one function (design, section 4)."""
    answered, depth = sweeper.answered(pairs), sweeper.vlm.num_layers
    changed = sweeper.changed(sweeper.single_layer_branches(config.intervention), "layer by layer")
    change_rate = [statistics.rate(c) for c in changed]
    intervals = [statistics.clustered_interval(list(zip(c[::2], c[1::2], strict=True))) for c in changed]
    flip_rate = []
    if config.intervention == "swap":
        flipped = sweeper.flipped([[k] for k in range(depth)], "flips, layer by layer")
        flip_rate = [statistics.rate(f) for f in flipped]
    if answered < MIN_ANSWERED_PAIRS:  # the rates are kept, with their intervals; nothing is concluded
        return FunctionProfile(
            "not_measurable", len(pairs), answered, change_rate, flip_rate, intervals, {}, None, [], [], False
        )
    if config.intervention != "swap":
        return _drop_profile(config, len(pairs), answered, change_rate, intervals)
    controls = sweeper.controls(config.control_pairs)
    floor = _floor(controls, depth)
    peak = statistics.peak(change_rate, flip_rate, floor)
    block, details = statistics.flip_block(
        lambda layers: statistics.rate(
            sweeper.flipped([layers], f"block {layers.start}-{layers.stop - 1}")[0]
        ),
        depth,
        flip_rate,
    )
    return FunctionProfile(
        "ok", len(pairs), answered, change_rate, flip_rate, intervals, controls, peak,
        statistics.papers_block(change_rate, peak, floor), block, len(block) > depth / 4,
        {**details, "rows_run": sweeper.rows_run},
    )  # fmt: skip


def _floor(controls: dict[str, list[float]], depth: int) -> list[float]:
    """Per layer the larger of the self-swap and the nuisance swap; 0 where neither was measured."""
    measured = [c for c in (controls.get("self"), controls.get("nuisance")) if c]
    return [max(values) for values in zip(*measured, strict=True)] if measured else [0.0] * depth


def _drop_profile(
    config: ProfileConfig, pairs: int, answered: int, change_rate: list[float], intervals: list[list[float]]
) -> FunctionProfile:
    """Drops have no donor: no flips, no controls. For cumulative drops the peak is the largest step."""
    depth = len(change_rate)
    signal = change_rate
    if config.intervention == "drop-from":
        signal = [c - n for c, n in zip(change_rate, [*change_rate[1:], 0.0], strict=True)]
    peak = statistics.peak(signal, [], [0.0] * depth)
    layers = statistics.papers_block(signal, peak, [0.0] * depth)
    return FunctionProfile(
        "ok", pairs, answered, change_rate, [], intervals, {}, peak, layers, [], len(layers) > depth / 4
    )


def _estimate(vlm: VisionLanguageModel, probes: ProbeSet, config: ProfileConfig) -> Profile:
    """--dry-run: say what a run would cost; nothing is written."""
    depth = vlm.num_layers
    for name, pairs in probes.pairs.items():
        directions, controls = 2 * len(pairs), 2 * min(config.control_pairs, len(pairs))
        rows = directions * depth
        if config.intervention == "swap":
            rows += directions * (depth + 1) + 4 * controls * depth
        print(f"{name}: {len(pairs)} pairs, about {rows} rows of {depth} layers, plus joint swaps if needed")
    versions = {p: metadata.version(p) for p in ("vfl-train", *PACKAGES)}
    return Profile(
        vlm.info, config.intervention, config.phase, config.path, vlm.dtype, config.seed, versions,
        {"name": probes.name, "sha256": probes.sha256}, {},
    )  # fmt: skip


def _print(found: Profile) -> None:
    table = Table("function", "answered", "peak layer", "changed there", "layers (papers)", "flip block")
    for name, f in found.functions.items():
        peak = "-" if f.peak_layer is None else str(f.peak_layer)
        at_peak = "-" if f.peak_layer is None else f"{f.change_rate[f.peak_layer]:.0%}"
        status = "" if f.status == "ok" else f" ({f.status})"
        table.add_row(
            name + status, f"{f.pairs_answered}/{f.pairs}", peak, at_peak,
            format_layers(f.layers), format_layers(f.flip_block),
        )  # fmt: skip
    Console().print(table)
