"""`vfl-train profile`: find the layers at which a model reads each function out of the image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vfl_train.functions.builtin.canvas import SIZE
from vfl_train.functions.probes import ProbeSet, builtin_probe_set, load_probe_set, most_pairs
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.profiling import partial
from vfl_train.profiling.compare import base_profile, compare, load_base
from vfl_train.profiling.estimate import estimate, summary
from vfl_train.profiling.measure import PACKAGES, measure
from vfl_train.profiling.show import show
from vfl_train.report.heatmap import save_heatmap
from vfl_train.report.pages import profile_page
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import Profile

if TYPE_CHECKING:
    from vfl_train.config import ProfileConfig


def profile(config: ProfileConfig) -> Profile | None:
    """Profile the model of `config` and write profile.json, profile.png and report.html. Prints the layers
    found; with `dry_run` what it would cost, and returns None. A run that was cut short goes on with the
    function it was at. Raises ConfigError, DataError (exit codes 2, 3)."""
    if config.profile is not None:
        from vfl_train.profiling.take import take_profile

        return take_profile(config)
    own = None
    if config.probes is not None:
        own = load_probe_set(config.probes, config.functions, most_pairs(config.pairs, config.limit))
        _say_what_is_left_out(own)
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, config.device, config.load_in_4bit,
        config.max_pixels, config.adapter, load_in_8bit=config.load_in_8bit,
    )  # fmt: skip
    probes = own or builtin_probe_set(
        config.functions,
        most_pairs(config.pairs, config.limit),
        config.seed,
        world=vlm.world,
        box=vlm.box_convention(SIZE),
    )
    base_path = base_profile(config.adapter)
    base = None
    if base_path is not None:
        base = load_base(base_path, vlm, config.intervention, config.phase)
    expected = estimate(vlm, probes, config)  # fails before anything is written or removed
    if config.dry_run:
        print("\n".join([*(e.line() for e in expected), summary(expected)]))
        return None
    inputs = {"probe_set": probes.sha256, "model": model_digest(vlm)}
    if config.adapter is not None:  # its weights are in the model's digest, its scale is not
        inputs["adapter"] = file_sha256(Path(config.adapter) / "adapter_config.json")
    if base_path is not None:
        inputs["base_profile"] = file_sha256(base_path)
    wanted = fingerprint("profile", config, inputs, PACKAGES)
    run = RunFolder.open(config.output, wanted, config.overwrite)
    if run.already_done:
        print(f"already done: {run.folder}")
        return Profile.load(run.folder)
    print(summary(expected))
    with run:
        found = measure(vlm, probes, config, run)
        if base is not None:
            found = replace(found, compared_with=compare(base, found.functions))
        _write(run, found, probes)
        partial.remove(run)
    show(found)
    return found


def _write(run: RunFolder, found: Profile, probes: ProbeSet) -> None:
    run.write_json("profile.json", found.to_json())
    with run.replacing("profile.png") as path:
        save_heatmap(found, path)
    run.write_text("report.html", profile_page(found, probes))


def _say_what_is_left_out(probes: ProbeSet) -> None:
    """One line for each function of which the folder holds more pairs than are used."""
    for name, pairs in probes.pairs.items():
        if len(pairs) < probes.available[name]:
            print(f"{name}: the first {len(pairs)} of {probes.available[name]} pairs are used (--pairs)")
