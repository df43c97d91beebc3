"""The main job: profile -> select -> lora -> eval -> merge -> verify, each step the command of that name.

Steps write their own folders and are skipped when done, so a stopped run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vfl_train.config import (
    EvalConfig,
    LoraConfig,
    MergeConfig,
    ProfileConfig,
    RunConfig,
    SelectConfig,
    VerifyConfig,
)
from vfl_train.recipe import Recipe
from vfl_train.runs import is_done
from vfl_train.schemas import Profile, read_json


@dataclass(frozen=True)
class Steps:
    """The settings of every step."""

    profile: ProfileConfig
    select: SelectConfig
    lora: LoraConfig
    eval: EvalConfig
    merge: MergeConfig


@dataclass
class Outcome:
    """What the steps left in their folders, the seconds each took, and which were done before."""

    steps: Steps
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    @property
    def profile(self) -> Profile:
        return Profile.load(self.steps.profile.output)

    @property
    def selection(self) -> dict[str, Any]:
        return read_json(Path(self.steps.select.output) / "selection.json")

    @property
    def scorecard(self) -> dict[str, Any]:
        return read_json(Path(self.steps.eval.output) / "scorecard.json")

    @property
    def verification(self) -> dict[str, Any]:
        return read_json(Path(self.steps.merge.output) / "verification.json")


def run_steps(steps: Steps) -> Outcome:
    """Run every step. Raises what the steps raise; what is done stays done."""
    from vfl_train.data_select.run import select
    from vfl_train.evaluation.run import evaluate
    from vfl_train.hub.merge import merge
    from vfl_train.hub.verify import verify
    from vfl_train.profiling.run import profile
    from vfl_train.training.run import train_lora

    outcome = Outcome(steps)
    console = Console(stderr=True, highlight=False)
    verify_merged = VerifyConfig(folder=steps.merge.output)
    plan: list[tuple[str, Callable[[Any], Any], Any]] = [
        ("profile", profile, steps.profile), ("select", select, steps.select),
        ("lora", train_lora, steps.lora),
        ("eval", evaluate, steps.eval), ("merge", merge, steps.merge), ("verify", verify, verify_merged),
    ]  # fmt: skip
    for name, command, config in plan:
        console.rule(f"[bold]{name}", align="left")
        if name != "verify" and not config.overwrite and is_done(config.output):
            outcome.skipped.add(name)
        start = time.perf_counter()
        command(config)
        outcome.seconds[name] = time.perf_counter() - start
    return outcome


def run_recipe(config: RunConfig) -> Outcome:
    """`vfl-train run RECIPE`. What the recipe does not say follows from the step before: LoRA trains on the
    selected rows, eval and merge take the adapter."""
    recipe = Recipe.load(config.recipe)
    select = recipe.config(SelectConfig)
    lora_flags: dict[str, Any] = {}
    if "data" not in recipe.sections.get("lora", {}):
        data, root = selected_data(select)
        lora_flags = {"data": str(data), "image_root": root}
    lora = recipe.config(LoraConfig, lora_flags)
    eval_flags = {} if "adapter" in recipe.sections.get("eval", {}) else {"adapter": str(lora.output)}
    merge_flags = {} if "adapters" in recipe.sections.get("merge", {}) else {"adapters": (str(lora.output),)}
    return run_steps(
        Steps(
            recipe.config(ProfileConfig), select, lora, recipe.config(EvalConfig, eval_flags),
            recipe.config(MergeConfig, merge_flags),
        )
    )  # fmt: skip


def selected_data(config: SelectConfig) -> tuple[Path, Path]:
    """Where select writes the picked rows, in the format they come in, and the folder that image paths in
    them are relative to: that of the input. Raises what opening --data raises."""
    from vfl_train.data.containers import open_container

    found, container = open_container(config.data)
    root = config.image_root or (found if found.is_dir() else found.parent)
    return Path(config.output) / f"selected{container.extension}", root
