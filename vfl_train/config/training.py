"""Settings of the commands that choose rows and train on them: select, lora, plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vfl_train.config.common import (
    ModelOptions,
    at_least,
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

METHODS = ("vfl", "random", "loss", "visual-gain")
ABLATIONS = ("block", "blank", "nested", "knockout")
BUCKET_RULES = ("auto", "need", "signature")
CONTROLS = ("all", "random", "reversed")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
EMITS = ("peft", "llamafactory", "swift", "axolotl")
SELECT_EMITS = ("llamafactory", "swift")
OVERLONG = ("drop", "shrink-image", "error")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
PARTS = ("connector", "vision")


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
    bucket_rule: str = option(
        "auto",
        choices=BUCKET_RULES,
        help="need: the function whose layers matter most; signature: the one whose probes are alike "
        "layer by layer; auto: that where layers are shared.",
    )
    probes: Path | None = option(
        None, metavar="DIR", help="Probe pairs that signatures are learned from. [the built-in ones]"
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
