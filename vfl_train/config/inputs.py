"""Settings of the commands that look at what goes in: data, probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vfl_train.config.common import (
    at_least,
    check_functions,
    functions_option,
    image_root_option,
    overwrite_option,
)
from vfl_train.options import Config, option


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """`vfl-train data`."""

    action: str = option(
        argument=True,
        metavar="check|preview",
        choices=("check", "preview"),
        help="check: count and name bad rows; preview: show the first ones as the model will see them.",
    )
    data: str = option(
        argument=True, metavar="D", help="File, folder, pattern of shards, or data set of the Hub."
    )
    image_root: Path | None = image_root_option()
    model: str = option("phantom", metavar="NAME", help="Whose processor the rows are shown through.")
    revision: str | None = option(None, metavar="COMMIT", help="Commit of a Hub model.")
    max_pixels: int | None = option(None, help="Largest image the processor passes on, in pixels.")
    max_length: int | None = option(
        None, help="Of check: encode every row with the model's processor and count those longer than this."
    )
    limit: int | None = option(None, help="Look at this many rows only.")
    strict: bool = option(False, help="Of check: fail (exit 3) if any row is unusable, not only if all are.")
    output: Path | None = option(
        None,
        metavar="DIR",
        help="Of check: folder to write quarantine.jsonl and report.json to.",
        shared=False,
    )
    overwrite: bool = overwrite_option()

    def check(self) -> None:
        at_least(self, limit=1, max_pixels=1, max_length=1)


@dataclass(frozen=True, kw_only=True)
class ProbesConfig(Config):
    """`vfl-train probes`."""

    action: str = option(
        argument=True,
        metavar="check|export",
        choices=("check", "export"),
        help="check: read every pair; export: write the built-in pairs, to look at and to edit.",
    )
    folder: Path = option(argument=True, metavar="DIR", help="Folder with pairs.jsonl and its images.")
    functions: tuple[str, ...] = functions_option("Of export. [all six]", shared=False)
    pairs: int = option(50, help="Of export: probe pairs a function.")
    box: str | None = option(
        None,
        choices=("pixels", "relative-1000"),
        help="Of export: ask grounding for a box in these coordinates instead of a choice.",
    )
    seed: int = option(0, help="Of export: seed of everything random.")

    def check(self) -> None:
        check_functions(self.functions)
        at_least(self, pairs=1, seed=0)
