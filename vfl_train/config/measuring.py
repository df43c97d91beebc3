"""Settings of the commands that measure a model: profile, eval, knockout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vfl_train.config.common import (
    ModelOptions,
    at_least,
    check_functions,
    check_what_is_scored,
    dry_run_option,
    functions_option,
    image_root_option,
    output_option,
    overwrite_option,
)
from vfl_train.errors import ConfigError
from vfl_train.options import option, parse_layers, parse_weights
from vfl_train.schemas import (
    BUILTIN_FUNCTIONS,
    INTERVENTIONS,
    MATCHES,
    MODULES,
    PATHS,
    PHASES,
    RERUN_AT,
    check_function_name,
)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(ModelOptions):
    """`vfl-train profile`."""

    output: Path = output_option("profile.json, profile.png and report.html")
    adapter: str | None = option(None, metavar="A", help="LoRA adapter to put on the model first.")
    # Not shared: a recipe's profile is what the other commands read.
    profile: str | None = option(
        None,
        metavar="P",
        shared=False,
        help="Take this profile of the model (a path or hub:USER/NAME), checked, instead of measuring one.",
    )
    # Not shared: select compares a row's need of every function, whichever of them is wanted.
    functions: tuple[str, ...] = functions_option("[all of the probe set]", shared=False)
    probes: Path | None = option(
        None, metavar="DIR", help="Folder with your own probe pairs. [the built-in ones]"
    )
    pairs: int = option(50, help="Probe pairs a function.")
    intervention: str = option(
        "swap",
        choices=INTERVENTIONS,
        help="swap: text reads the other image of the pair at this layer; drop: no image there; "
        "drop-from: no image from this layer on.",
    )
    phase: str = option(
        "text", choices=PHASES, help="Which queries are bound: all text after the image, or the answer's."
    )
    path: str = option("engine", choices=PATHS, help="Shared-prefix engine, or one plain forward per branch.")
    drop_points: float = option(
        1.0, help="Points of answers that the drop plan may lose; says from which layer on the image can go."
    )
    control_pairs: int = option(
        20, help="Pairs a function for the control swaps (noise is one fixed draw, whatever --seed)."
    )
    batch_tokens: int = option(8192, help="Tokens a batch may hold; lower it when memory runs out.")
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()

    def check(self) -> None:
        super().check()
        check_functions(self.functions)
        if self.profile is not None and (self.adapter is not None or self.probes is not None):
            raise ConfigError("--profile takes a finished profile", "leave --adapter and --probes out")
        at_least(self, pairs=1, control_pairs=0, batch_tokens=1, drop_points=0)
        strangers = [f for f in self.functions if self.probes is None and f not in BUILTIN_FUNCTIONS]
        if strangers:
            built_in = ", ".join(BUILTIN_FUNCTIONS)
            raise ConfigError(f"unknown function {strangers[0]!r}", f"built in are {built_in}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ModelOptions):
    """`vfl-train eval`."""

    adapter: str | None = option(None, metavar="A", help="Adapter to judge; its base is measured beside it.")
    base: str | None = option(
        None,
        metavar="NAME",
        shared=False,
        help="Another model to measure beside --model, question by question: of a merged model, its base.",
    )
    probes: Path | None = option(
        None, metavar="DIR", excludes=("data",), help="Folder with probe pairs. [the built-in ones]"
    )
    # Not shared: a recipe's data is what the model was trained on.
    data: str | None = option(
        None, metavar="D", shared=False, excludes=("probes",), help="Score the answers of these rows instead."
    )
    match: str = option(
        "exact",
        choices=(*MATCHES, "number"),
        shared=False,
        help="How rows of --data are judged: the same text, the option named first, boxes that overlap, or "
        "the one number said.",
    )
    image_root: Path | None = image_root_option()
    # Not shared: forgetting shows in the functions that were not trained.
    functions: tuple[str, ...] = functions_option("[all]", shared=False)
    drop_from: tuple[int, ...] = option(
        (),
        metavar="K,..",
        help="Also score with the image dropped from layer K to the last, for each K (of an adapter: "
        "the adapted model, not its base).",
    )
    path: str = option(
        "engine", choices=PATHS, help="How drops run: shared-prefix engine, or one plain forward per branch."
    )
    knockout: Path | None = option(
        None, metavar="FILE", help="Also score without the layer that this knockout.json leaves out."
    )
    rerun: str | None = option(
        None,
        metavar="LAYER|NAME",
        form="list",
        help="Also score with these layers, or this function's in the profile, run twice; and, as controls, "
        "with every other place of as many layers.",
    )
    rerun_at: str = option(
        "end", choices=RERUN_AT, help="When layers run again: after the last one, or each right after itself."
    )
    profile: str | None = option(
        None, metavar="P", help="profile.json (a path or a Hub repo) for --rerun NAME."
    )
    fail_if_drop: str | None = option(
        None,
        metavar="F=N,..",
        form="weights",
        help="Exit 4 if a function lost more than N points against the base, like ocr=1.0,count=2.",
    )
    pairs: int = option(50, help="Probe pairs a function.")
    max_new_tokens: int = option(32, help="Longest generated answer, in tokens.")
    batch_size: int = option(32, help="Prompts at once.")
    batch_tokens: int = option(8192, help="Tokens a batch may hold; lower it when memory runs out.")
    output: Path = output_option("scorecard.json")
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()

    def check(self) -> None:
        super().check()
        check_functions(self.functions)
        at_least(self, pairs=1, max_new_tokens=1, batch_size=1, batch_tokens=1)
        check_what_is_scored(self.probes, self.data, self.match)
        if any(layer < 0 for layer in self.drop_from):
            raise ConfigError("--drop-from takes 0-based layers", "write them like 24,20,16")
        if self.rerun is not None and not self.rerun[:1].isdigit():
            check_function_name(self.rerun)
        elif self.rerun is not None:
            parse_layers(self.rerun)
        if self.fail_if_drop is not None:
            for name in parse_weights(self.fail_if_drop, "--fail-if-drop"):
                check_function_name(name)
            if self.adapter is None and self.base is None:
                raise ConfigError("--fail-if-drop compares with a base", "give --adapter, or --base")
        if self.adapter is not None and self.base is not None:
            raise ConfigError("an adapter is compared with the model it sits on", "leave --base out")


@dataclass(frozen=True, kw_only=True)
class KnockoutConfig(ModelOptions):
    """`vfl-train knockout`."""

    data: str = option(metavar="D", help="Rows to choose the layer on and to hold out.")
    image_root: Path | None = image_root_option()
    match: str = option(
        "exact",
        choices=MATCHES,
        shared=False,
        help="How rows are judged: the same text, the option named first, or boxes that overlap.",
    )
    shots: int = option(10, help="Rows of each task to choose the layer on; the rest is held out.")
    module: str = option("attention", choices=MODULES, help="What of a layer is left out.")
    path: str = option(
        "engine", choices=PATHS, help="How: sharing what lies below a layer, or one plain forward per branch."
    )
    max_new_tokens: int = option(32, help="Longest generated answer, in tokens.")
    batch_tokens: int = option(8192, help="Tokens a batch may hold; lower it when memory runs out.")
    output: Path = output_option("knockout.json")
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()

    def check(self) -> None:
        from vfl_train.knockout.choice import MIN_SHOTS

        super().check()
        at_least(self, shots=MIN_SHOTS, max_new_tokens=1, batch_tokens=1)
