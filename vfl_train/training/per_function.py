"""`lora --per-function`: one adapter a function, each on its own layers and its own rows.

    OUTPUT/ocr/, OUTPUT/count/, ...   ordinary adapter folders
    OUTPUT/summary.json               what each was trained on and what came out

Functions are trained one after the other and each is a run of its own: what is finished is not done again,
what was interrupted is resumed. Adapters of functions that share no layer can be merged without any effect on
each other (`vfl-train merge`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.runs import fingerprint
from vfl_train.schemas import Profile, read_json
from vfl_train.training.distributed import open_run, world
from vfl_train.training.plan import choose_layers
from vfl_train.training.rows import TrainingRows

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig

SUMMARY, SUMMARY_SCHEMA_VERSION = "summary.json", 1
log = logging.getLogger(__name__)


def train_per_function(
    config: LoraConfig,
    profile: Profile | None,
    rows: Mapping[str, TrainingRows],
    inputs: Mapping[str, str],
    packages: tuple[str, ...],
    train_one: Callable[[LoraConfig, TrainingRows], object],
) -> Path:
    """Train an adapter for each function of `rows` with `train_one`, and write the summary.

    Args:
        rows: the rows of each function, made before anything is trained: what cannot work is known at once.
        inputs: name -> sha256 of what all of them read.
        packages: distributions that the result depends on.

    Returns:
        The output folder.

    Raises:
        ConfigError: the folder holds another run. Else what `train_one` raises; finished functions stay.
    """
    for pair, layers in shared_layers(planned_layers(config, profile)).items():
        log.warning("%s share layers %s: merged, their updates add up there", pair, layers)
    wanted = {**fingerprint("lora", config, inputs, packages), "world_size": world().size}
    with open_run(config.output, wanted, config.overwrite, config.allow_config_change) as run:
        for number, (function, its) in enumerate(rows.items(), start=1):
            log.info("%s (%d of %d): %d rows", function, number, len(rows), len(its.rows))
            # Also where this is done already: each adapter's own fingerprint covers the model.
            train_one(one_function(config, function), its)
        if not run.already_done and world().is_main:
            value = {f: _outcome(Path(config.output) / f) for f in rows}
            shared = shared_layers({f: its["layers"] for f, its in value.items()})
            found = {"schema_version": SUMMARY_SCHEMA_VERSION, "functions": value, "shared_layers": shared}
            run.write_json(SUMMARY, found)
    return run.folder


def one_function(config: LoraConfig, function: str) -> LoraConfig:
    """The settings of one function's run. `overwrite` is off: the folder around it has been emptied. All
    share one prefix cache, outside of that folder."""
    from vfl_train.training.prefix_cache import cache_folder

    output = Path(config.output) / function
    return replace(
        config, functions=(function,), output=output, overwrite=False, cache_dir=cache_folder(config)
    )


def planned_layers(config: LoraConfig, profile: Profile | None) -> dict[str, tuple[int, ...]]:
    """The layers that each function's adapter will have; without a profile it is not known yet."""
    if profile is None:
        return {}
    return {
        function: choose_layers(
            profile.model, profile=profile, functions=(function,), layer_rule=config.layer_rule,
            control=config.control, seed=config.seed,
        ).layers
        for function in config.functions
    }  # fmt: skip


def shared_layers(layers: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Layers that two of the functions both train, by their names joined with a plus."""
    both = {f"{a}+{b}": sorted({*layers[a]} & {*layers[b]}) for a, b in combinations(layers, 2)}
    return {pair: found for pair, found in both.items() if found}


def _outcome(folder: Path) -> dict[str, Any]:
    """What a finished adapter folder says of its training."""
    plan = read_json(folder / "plan.json")
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    found = {
        "folder": folder.name, "layers": plan["layers"],
        "trainable_parameters": plan["trainable_parameters"],
        "rows": next((e["rows"] for e in entries if "rows" in e), None),
        "steps": max((e["step"] for e in entries), default=0),
    }  # fmt: skip
    last: dict[str, Any] = next((e for e in reversed(entries) if "train_loss" in e), {})
    found |= {"train_loss": last.get("train_loss"), "seconds": last.get("train_runtime")}
    losses = [e["eval_loss"] for e in entries if e.get("eval_loss") is not None]
    return {**found, "eval_loss": min(losses)} if losses else found
