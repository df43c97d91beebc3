"""Settings of the commands that ship what was trained: merge, export, verify, migrate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vfl_train.config.common import (
    DTYPES,
    at_least,
    check_device,
    check_what_is_scored,
    dry_run_option,
    image_root_option,
    output_option,
    overwrite_option,
)
from vfl_train.errors import ConfigError
from vfl_train.options import Config, option
from vfl_train.schemas import MATCHES

TARGETS = ("peft", "vllm", "sglang", "gguf")
MIGRATIONS = ("current", "legacy")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Config):
    """`vfl-train merge`."""

    adapters: tuple[str, ...] = option(argument=True, metavar="ADAPTER...", help="Adapters to merge.")
    model: str | None = option(None, metavar="NAME", help="Base model. [the one the adapters name]")
    output: Path = output_option("the merged model")
    allow_overlap: bool = option(False, help="Merge adapters that share layers; their updates add up.")
    dtype: str = option(
        "auto", choices=DTYPES, help="Number format of the merged weights; auto: that of the base's files."
    )
    device: str = option("auto", help="auto, cpu, mps, cuda or cuda:N.")
    # What the merge is scored on. Not shared: a recipe's data is what the adapters were trained on.
    probes: Path | None = option(
        None, metavar="DIR", excludes=("data",), shared=False, help="Probe pairs to score on. [the built-in]"
    )
    data: str | None = option(
        None, metavar="D", shared=False, excludes=("probes",), help="Score on the answers of these rows."
    )
    match: str = option(
        "exact", choices=(*MATCHES, "number"), shared=False, help="How rows of --data are judged."
    )
    image_root: Path | None = image_root_option()
    pairs: int = option(10, shared=False, help="Score on so many probe pairs a function; 0: no score.")
    seed: int = option(0, help="Seed of everything random.")
    overwrite: bool = overwrite_option()

    def check(self) -> None:
        check_device(self.device)
        at_least(self, pairs=0, seed=0)
        if not self.adapters:
            raise ConfigError("no adapter to merge", "vfl-train merge ADAPTER [ADAPTER ...] --output DIR")
        check_what_is_scored(self.probes, self.data, self.match)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """`vfl-train export`."""

    source: Path = option(
        argument=True,
        metavar="DIR",
        help="Adapter, merged model, profile or selection; with --knockout, any model.",
    )
    output: Path = output_option("what can be published")
    target: str = option("peft", choices=TARGETS, help="Who will load it.")
    base: str | None = option(None, metavar="NAME", help="Base model. [the one the source names]")
    allow_vision: bool = option(
        False, help="Export LoRA on the vision tower for vllm too, where it is an experiment."
    )
    push_to_hub: str | None = option(
        None, metavar="USER/NAME", help="Upload there too; the token is the one of `hf auth login`."
    )
    private: bool = option(False, help="With --push-to-hub: nobody else may see it.")
    base_model_id: str | None = option(
        None,
        metavar="ORG/NAME",
        help="What the base is on the Hub, if it is a folder here; @COMMIT may follow.",
    )
    scorecard: Path | None = option(
        None,
        metavar="FILE",
        help="scorecard.json of these weights, for the card: what was gained and forgotten.",
    )
    with_rows: bool = option(
        False, help="Of a selection the picked rows too, of a profile the questions of your own probes."
    )
    knockout: Path | None = option(
        None, metavar="FILE", help="knockout.json whose layer is knocked out for good."
    )
    dry_run: bool = dry_run_option()
    overwrite: bool = overwrite_option()

    def check(self) -> None:
        if self.push_to_hub is not None and not re.match(r"[\w.-]+/[\w.-]+\Z", self.push_to_hub):
            raise ConfigError(f"--push-to-hub must be USER/NAME, not {self.push_to_hub!r}")
        if self.private and self.push_to_hub is None:
            raise ConfigError("--private is for --push-to-hub", "give it too, or leave --private out")
        if self.push_to_hub is not None and self.knockout is not None:
            raise ConfigError(
                "--knockout and --push-to-hub exclude each other",
                "export the knocked-out model first, look at it, then export that folder with --push-to-hub",
            )
        if self.base_model_id is not None and not re.match(
            r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?\Z", self.base_model_id
        ):
            raise ConfigError(
                f"--base-model-id must be ORG/NAME or ORG/NAME@COMMIT, not {self.base_model_id!r}"
            )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """`vfl-train verify`."""

    folder: Path = option(argument=True, metavar="DIR", help="Adapter, export or merged model to verify.")
    base: str | None = option(None, metavar="NAME", help="Base model. [the one the folder names]")
    samples: int = option(4, help="Prompts to compare outputs on.")

    def check(self) -> None:
        at_least(self, samples=1)


@dataclass(frozen=True, kw_only=True)
class MigrateConfig(Config):
    """`vfl-train migrate`."""

    adapter: Path = option(
        argument=True, metavar="ADAPTER", help="Adapter with key names of an older version."
    )
    output: Path = output_option("the renamed adapter")
    to: str = option(
        "current",
        choices=MIGRATIONS,
        help="Names to give: today's, or those before transformers 4.52 (legacy).",
    )
    model: str | None = option(None, metavar="NAME", help="Base model. [the one the adapter names]")
    overwrite: bool = overwrite_option()
