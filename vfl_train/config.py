"""The settings of every command, one frozen dataclass each.

A field is the option `--its-name` of the command line and the key `its_name` of a recipe; its help text is
what --help shows. Rules between fields stand in `check`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vfl_train.common_options import (
    DTYPES,
    ModelOptions,
    at_least,
    check_device,
    check_functions,
    dry_run_option,
    functions_option,
    image_root_option,
    layer_rule_option,
    output_option,
    overwrite_option,
)
from vfl_train.errors import ConfigError
from vfl_train.options import Config, budget_rows, option, parse_layers, parse_weights
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

METHODS = ("vfl", "random", "loss", "visual-gain")
ABLATIONS = ("block", "blank", "nested", "knockout")
CONTROLS = ("all", "random", "reversed")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
TARGETS = ("peft", "vllm", "sglang", "gguf")
MIGRATIONS = ("current", "legacy")
EMITS = ("peft", "llamafactory", "swift", "axolotl")
SELECT_EMITS = ("llamafactory", "swift")
OVERLONG = ("drop", "shrink-image", "error")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
PARTS = ("connector", "vision")


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
class SelectConfig(ModelOptions):
    """`vfl-train select`."""

    profile: str = option(metavar="P", help="profile.json of this model, its folder, or a Hub repo.")
    data: str = option(metavar="D", help="Data to sort and pick from: file, folder, shards or Hub id.")
    image_root: Path | None = image_root_option()
    budget: str = option("0.2", metavar="N", help="Share of the kept rows (below 1) or a number of rows.")
    functions: tuple[str, ...] = functions_option("[all the profile could measure]")
    method: str = option("vfl", choices=METHODS, help="How rows are scored.")
    ablation: str = option(
        "block", choices=ABLATIONS, help="What is taken away at a function's layers to see if a row needs it."
    )
    mix: str | None = option(
        None, metavar="F=N,..", form="weights", help="Shares of the budget, like ocr=0.5,count=0.5."
    )
    layer_rule: str = layer_rule_option()
    fill: bool = option(False, help="Complete the budget by score when the wanted buckets hold too few rows.")
    cap_per_source: str | None = option(
        None, metavar="N", help="Most rows of one source: a share of the budget (below 1) or a number."
    )
    emit: str | None = option(
        None, choices=SELECT_EMITS, help="Write side files with which this trainer reads the selection."
    )
    from_scores: Path | None = option(
        None, metavar="DIR", help="Output of an earlier select: pick again without running the model."
    )
    batch_tokens: int = option(8192, help="Tokens a batch may hold; lower it when memory runs out.")
    num_processes: int | None = option(
        None, help="Processes of this machine to score with. [one a GPU; 1 on the CPU]"
    )
    output: Path = output_option("the selected rows, scores and report")
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()

    def check(self) -> None:
        super().check()
        check_functions(self.functions)
        at_least(self, batch_tokens=1, num_processes=1)
        budget_rows(self.budget, 1)
        if self.cap_per_source is not None:
            budget_rows(self.cap_per_source, 1, "--cap-per-source")
        if self.mix is not None:
            self._check_mix(parse_weights(self.mix, "--mix"))

    def _check_mix(self, mix: dict[str, float]) -> None:
        strangers = [name for name in mix if self.functions and name not in self.functions]
        if strangers:
            raise ConfigError(f"--mix names {strangers[0]!r}, which --functions does not")
        if sum(mix.values()) > 1 + 1e-9 or not any(mix.values()):
            raise ConfigError(
                f"--mix adds up to {sum(mix.values()):g}", "shares of the budget add up to at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ModelOptions):
    """`vfl-train lora`. The fields of the group training have the names of transformers.TrainingArguments,
    those of LoRA the usual ones."""

    profile: str | None = option(
        None, metavar="P", help="profile.json (a path or a Hub repo) that says which layers to train."
    )
    functions: tuple[str, ...] = option(
        (), metavar="NAME,..", help="Train the layers of these vision functions.", excludes=("layers",)
    )
    layers: str | None = option(
        None,
        metavar="20-23,25",
        form="list",
        help="Train exactly these decoder layers (0-based, ranges inclusive).",
        excludes=("functions",),
    )
    layer_rule: str = layer_rule_option()
    data: str = option(metavar="D", help="Training data: file, folder, shards or Hub id.")
    image_root: Path | None = image_root_option()
    output: Path = output_option("the adapter")
    control: str | None = option(
        None, choices=CONTROLS, help="Train a control instead: all layers, random ones, or the mirrored ones."
    )
    also_adapt: tuple[str, ...] = option(
        (),
        metavar="PART,..",
        help="Put LoRA on the linear layers of these parts too: connector, vision. [neither]",
    )
    per_function: bool = option(False, help="One adapter a function, each on its own layers and rows.")
    scores: Path | None = option(
        None,
        metavar="DIR",
        help="Output of select: which function each row trains. [the data's folder, if it is one]",
    )
    max_length: int | None = option(None, help="Longest row in tokens. [no limit]")
    overlong: str = option(
        "drop",
        choices=OVERLONG,
        help="Rows above --max-length: quarantine them, shrink their images until they fit, or stop.",
    )
    eval_data: str | None = option(
        None, metavar="D", help="Rows to measure the loss on while training. [a share of --data]"
    )
    eval_share: float = option(0.0, help="Share of --data held out for that.")
    early_stopping_patience: int = option(
        0, help="Stop after so many validations without a lower loss; 0: never."
    )
    cache_prefix: bool = option(False, help="Compute the layers below the lowest trained one only once.")
    cache_dir: Path | None = option(
        None,
        metavar="DIR",
        help="Where --cache-prefix keeps its files, for later runs too. [beside --output]",
    )
    deepspeed: str | None = option(
        None, metavar="zero2|zero3|FILE", help="DeepSpeed setting; needs the extra `deepspeed`."
    )
    num_processes: int | None = option(
        None, help="Processes of this machine to train with. [one a GPU; 1 on the CPU]"
    )
    ddp_timeout: int = option(
        120, help="Seconds to wait for a process that does not answer, before the run is given up."
    )
    allow_config_change: tuple[str, ...] = option(
        (), metavar="KEY,..", help="Settings that may differ from those of the run that is resumed."
    )
    dry_run: bool = dry_run_option()
    overwrite: bool = overwrite_option()

    lora_r: int = option(16, group="training", help="Rank.")
    lora_alpha: int = option(32, group="training", help="Scale: the update counts alpha / rank times.")
    lora_dropout: float = option(0.0, group="training", help="Dropout in the adapter.")
    learning_rate: float = option(1e-4, group="training", help="Peak learning rate.")
    num_train_epochs: float = option(1.0, group="training", help="Passes over the data.")
    max_steps: int = option(-1, group="training", help="Optimizer steps; overrides the epochs when above 0.")
    per_device_train_batch_size: int = option(1, group="training", help="Rows a device takes at once.")
    gradient_accumulation_steps: int = option(8, group="training", help="Batches an optimizer step.")
    lr_scheduler_type: str = option(
        "cosine", choices=SCHEDULERS, group="training", help="Course of the learning rate."
    )
    # TrainingArguments has no warmup_ratio any more: a share below 1 goes into warmup_steps.
    warmup_steps: float = option(
        0.03, group="training", help="Warm-up: a share of all steps (below 1) or a number of steps."
    )
    weight_decay: float = option(0.0, group="training", help="Weight decay.")
    max_grad_norm: float = option(1.0, group="training", help="Gradients are clipped to this norm.")
    logging_steps: int = option(10, group="training", help="Log every so many steps.")
    save_steps: int = option(0, group="training", help="Checkpoint every so many steps; 0: only the end.")
    save_total_limit: int = option(2, group="training", help="Checkpoints to keep, at least 2.")
    eval_steps: int = option(0, group="training", help="Validation loss every so many steps; 0: each epoch.")
    load_best_model_at_end: bool = option(
        False, group="training", help="Keep the adapter of the lowest validation loss, not the last one."
    )
    activation_checkpointing: bool = option(
        False,
        group="training",
        help="Compute activations of the adapted layers again in backward: less memory, more time.",
    )
    attn_implementation: str = option(
        "sdpa", choices=ATTENTIONS, group="model", help="Attention of the model while training."
    )
    report_to: str = option("none", group="training", help="none, tensorboard, wandb, ...")
    bf16: bool | None = option(None, group="training", help="bfloat16 training. [where the device has it]")
    dataloader_num_workers: int = option(0, group="training", help="Processes that load rows.")

    def check(self) -> None:
        super().check()
        check_functions(self.functions)
        self._check_layers()
        self._check_training()

    def _check_layers(self) -> None:
        if self.layers is not None:
            parse_layers(self.layers)
        if self.layers is not None and self.functions:
            raise ConfigError("--layers and --functions exclude each other", "give one of them")
        if self.layers is None and not self.functions and self.control != "all":
            raise ConfigError(
                "nothing says which layers to train",
                "--functions ocr,count takes them from the profile, --layers 20-23 names them",
            )
        if self.functions and self.profile is None and self.control != "all":
            raise ConfigError("--functions needs --profile", "vfl-train profile makes one")
        if self.per_function and not self.functions:
            raise ConfigError("--per-function needs --functions", "name them, like --functions ocr,count")

    def _check_training(self) -> None:
        at_least(self, lora_r=1, lora_alpha=1, lora_dropout=0, learning_rate=0, num_processes=1)
        at_least(
            self, save_total_limit=2, eval_steps=0, early_stopping_patience=0, max_length=1, eval_share=0
        )
        at_least(self, per_device_train_batch_size=1, gradient_accumulation_steps=1, logging_steps=1)
        at_least(self, max_steps=-1, warmup_steps=0, weight_decay=0, max_grad_norm=0, save_steps=0)
        at_least(self, dataloader_num_workers=0, ddp_timeout=1)
        if self.eval_share >= 1:
            raise ConfigError(f"--eval-share must be below 1, not {self.eval_share}")
        validates = self.eval_data is not None or self.eval_share > 0
        if (self.load_best_model_at_end or self.early_stopping_patience) and not validates:
            raise ConfigError("there are no validation rows", "give --eval-data or --eval-share")
        strangers = [part for part in self.also_adapt if part not in PARTS]
        if strangers:
            raise ConfigError(f"--also-adapt {strangers[0]!r} is unknown", f"use {' or '.join(PARTS)}")
        if self.lora_dropout >= 1:
            raise ConfigError(f"--lora-dropout must be below 1, not {self.lora_dropout}")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ConfigError("--num-train-epochs must be above 0", "or give --max-steps")


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
        if self.probes is not None and self.data is not None:
            raise ConfigError("--probes and --data exclude each other", "give one of them")
        if self.match != "exact" and self.data is None:
            raise ConfigError("--match is for --data", "each probe pair says itself how it is judged")
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
        if self.probes is not None and self.data is not None:
            raise ConfigError("--probes and --data exclude each other", "give one of them")
        if self.match != "exact" and self.data is None:
            raise ConfigError("--match is for --data", "each probe pair says itself how it is judged")


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


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """`vfl-train plan`."""

    profile: str = option(
        metavar="P", help="profile.json (a path or a Hub repo) that says which layers to train."
    )
    functions: tuple[str, ...] = functions_option("[all the profile could measure]")
    layer_rule: str = layer_rule_option()
    emit: str = option("peft", choices=EMITS, help="Trainer to write the settings for.")
    model: str | None = option(None, metavar="NAME", help="Model to list modules of. [the profile's]")

    def check(self) -> None:
        check_functions(self.functions)


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


# Commands that read a recipe, with the settings its section of that name may hold.
COMMANDS: dict[str, type[Config]] = {
    "profile": ProfileConfig,
    "probes": ProbesConfig,
    "select": SelectConfig,
    "lora": LoraConfig,
    "eval": EvalConfig,
    "knockout": KnockoutConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "migrate": MigrateConfig,
    "plan": PlanConfig,
    "data": DataConfig,
}
