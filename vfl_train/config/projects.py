"""Settings of the commands that run the others: demo, run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vfl_train.config.common import at_least, overwrite_option
from vfl_train.options import Config, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """`vfl-train demo`."""

    output: Path = option(Path("vfl-demo"), metavar="DIR", help="Folder to write to.")
    overwrite: bool = overwrite_option()
    seed: int = option(0, help="Seed of everything random.")

    def check(self) -> None:
        at_least(self, seed=0)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """`vfl-train run`."""

    recipe: str = option(argument=True, metavar="RECIPE", help="Recipe file, or the name of a bundled one.")
