"""`vfl-train lora`: rows and a layer plan in, an adapter folder out."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vfl_train.hub.load import profile_file
from vfl_train.options import format_layers
from vfl_train.runs import CHECKPOINTS, RunFolder, file_sha256, fingerprint
from vfl_train.schemas import Profile
from vfl_train.training.distributed import world
from vfl_train.training.plan import LayerPlan, build_plan, choose_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from vfl_train.config import LoraConfig
    from vfl_train.models import VisionLanguageModel
    from vfl_train.training.rows import TrainingRows

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
LOG = "train_log.jsonl"
SERVING_PARTS = (
    "vLLM serves LoRA outside the decoder only with --enable-tower-connector-lora (experimental) and leaves "
    "it out without; SGLang and llama.cpp do not serve it: merge for them (vfl-train merge)"
)
log = logging.getLogger(__name__)


def train_lora(config: LoraConfig) -> Path:
    """Train LoRA on the planned layers and write the adapter folder (design, section 4).

    Returns:
        The output folder (with `dry_run`, the one that would be written).

    Raises:
        ConfigError: a plan that cannot be made, or an option that is not there yet.
        DataError: no usable rows.
        NumericError: a non-finite number, or a planned module that got no gradient.
    """
    from vfl_train.training import deepspeed, distributed
    from vfl_train.training.launch import relaunch
    from vfl_train.training.reporting import trackers

    deepspeed.name_accelerator()
    deepspeed.check(config)
    trackers(config.report_to)
    if not config.dry_run and relaunch(config):
        return Path(config.output)
    with distributed.session(config.device, config.ddp_timeout):
        return _train_here(config)


def _train_here(config: LoraConfig) -> Path:
    """`train_lora` in this process, which may be one of several."""
    from vfl_train.training.rows import buckets_of, prepare_rows, read_rows

    source = profile_file(config.profile) if config.profile else None
    profile = Profile.load(source) if source else None
    dataset = read_rows(config)
    buckets = buckets_of(config, dataset)
    if not config.per_function:
        rows = prepare_rows(config, dataset, buckets)
        return _train_one(config, source, profile, rows)
    from vfl_train.training.per_function import one_function, train_per_function

    by_function = {f: prepare_rows(config, dataset, buckets, f) for f in config.functions}
    if config.dry_run:
        for function, its in by_function.items():
            _dry_run(one_function(config, function), profile, its)
        return Path(config.output)
    inputs = {**by_function[config.functions[0]].inputs, "profile": file_sha256(source) if source else ""}
    return train_per_function(
        config, profile, by_function, inputs, _PACKAGES,
        lambda one, its: _train_one(one, source, profile, its),
    )  # fmt: skip


def _train_one(config: LoraConfig, source: Path | None, profile: Profile | None, rows: TrainingRows) -> Path:
    """One adapter on `rows`. `source` is the file of `profile`."""
    from vfl_train.models.digest import model_digest
    from vfl_train.training.distributed import open_run
    from vfl_train.training.rows import fit

    if config.dry_run:
        _dry_run(config, profile, rows)
        return Path(config.output)
    vlm, plan = _load_and_plan(config, profile)
    inputs = {
        **rows.inputs, "profile": file_sha256(source) if source else "", "model": model_digest(vlm),
    }  # fmt: skip
    wanted = {**fingerprint("lora", config, inputs, _PACKAGES), "world_size": world().size}
    with open_run(config.output, wanted, config.overwrite, config.allow_config_change) as run:
        if run.already_done:
            log.info("%s: already done", run.folder)
        else:
            _train_and_save(config, profile, fit(config, rows, vlm.encoder), vlm, plan, run)
    return run.folder


def _make_plan(
    config: LoraConfig, profile: Profile | None, vlm: VisionLanguageModel, warn: bool = True
) -> LayerPlan:
    from vfl_train.training.supervised import check_head

    check_head(vlm)
    choice = choose_layers(
        vlm.info,
        profile=profile,
        functions=config.functions,
        layers=config.layers,
        layer_rule=config.layer_rule,
        control=config.control,
        seed=config.seed,
    )
    warnings = [*choice.warnings]
    if config.also_adapt:
        warnings.append(f"--also-adapt {','.join(config.also_adapt)}: {SERVING_PARTS}")
    for warning in warnings if warn else ():
        log.warning("%s", warning)
    return build_plan(choice, vlm, config.lora_r, config.also_adapt)


def _dry_run(config: LoraConfig, profile: Profile | None, rows: TrainingRows) -> None:
    from vfl_train.training.estimate import estimate
    from vfl_train.training.preview import print_plan
    from vfl_train.training.skeleton import load_skeleton

    vlm = load_skeleton(config.model, config.revision, config.max_pixels)
    plan = _make_plan(config, profile, vlm)
    print_plan(plan, config, rows, vlm.layer_names)
    alone = replace(config, deepspeed=None)  # the probe is one process
    print(estimate(config, vlm, plan, rows, lambda: _load_and_plan(alone, profile, False)).text())


def _load_and_plan(
    config: LoraConfig, profile: Profile | None, warn: bool = True
) -> tuple[VisionLanguageModel, LayerPlan]:
    """Everything that may be refused, before the output folder is touched."""
    from vfl_train.models import VisionLanguageModel
    from vfl_train.training.deepspeed import loading_in_parts, settings_of
    from vfl_train.training.distributed import device_of
    from vfl_train.training.prefix_cache import check_possible

    with loading_in_parts(settings_of(config)):
        vlm = VisionLanguageModel.load(
            config.model, revision=config.revision, dtype=config.dtype, device=device_of(config.device),
            load_in_4bit=config.load_in_4bit, load_in_8bit=config.load_in_8bit,
            max_pixels=config.max_pixels, attn_implementation=config.attn_implementation,
        )  # fmt: skip
    plan = _make_plan(config, profile, vlm, warn)
    if config.cache_prefix:
        check_possible(vlm, plan)
    return vlm, plan


def _train_and_save(
    config: LoraConfig,
    profile: Profile | None,
    dataset: TrainingRows,
    vlm: VisionLanguageModel,
    plan: LayerPlan,
    run: RunFolder,
) -> None:
    from vfl_train.data.readers import write_quarantine
    from vfl_train.models.digest import weights_digest
    from vfl_train.report.training import training_png
    from vfl_train.training.adapter import adapter_config, apply_lora
    from vfl_train.training.agreement import agree_before_training
    from vfl_train.training.deepspeed import settings_of
    from vfl_train.training.frozen import limit_backward
    from vfl_train.training.mixed import same_modules
    from vfl_train.training.prefix_cache import prefix_cached
    from vfl_train.training.resume import Checkpoints, adapter_files
    from vfl_train.training.supervised import supervised_only
    from vfl_train.training.trainer import autocast_of, train
    from vfl_train.training.validation import watch

    run.write_json("plan.json", _public(plan.to_json()))
    if dataset.rejected:
        write_quarantine(dataset.rejected, run.path("quarantine.jsonl"))
    adapted = apply_lora(
        vlm.model, plan, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
        seed=config.seed,
    )  # fmt: skip
    limit_backward(vlm, plan, recompute=config.activation_checkpointing)
    collator = dataset.train.collator(vlm.encoder)
    collate = same_modules(collator, dataset.rows, settings_of(config))
    agree_before_training(config, dataset.rows, dataset.sha256, plan, adapted)
    settings = adapter_config(adapted, plan, vlm.name_or_path, vlm.revision)
    checkpoints = Checkpoints.of(run, config, adapter_files(settings, vlm.processor))
    with ExitStack() as undo:
        if config.cache_prefix:
            cached = prefix_cached(
                vlm, adapted, plan, dataset.rows, collator, config,
                digest=weights_digest(vlm), autocast=autocast_of(config, vlm.device),
            )  # fmt: skip
            collate = undo.enter_context(cached)
        undo.enter_context(supervised_only(vlm))
        curves, validation = watch(config, vlm, dataset, adapted, run.path(CHECKPOINTS))
        metrics = train(
            adapted, vlm.processor, dataset.rows, collate, config, run.path(LOG), checkpoints,
            curves=curves, validation=validation,
        )  # fmt: skip
    if profile is not None:
        run.write_json("profile.json", _public(profile.to_json()))
    save_adapter_folder(adapted, vlm, plan, config, run)
    if world().is_main:
        run.write_bytes("training.png", training_png(run.path(LOG)))
    _write_card(plan, config, dataset, metrics, run)
    log.info(
        "layers %s: mean loss %.4f after %.0f s; adapter in %s",
        format_layers(plan.layers), metrics["train_loss"], metrics["train_runtime"], run.folder,
    )  # fmt: skip


def save_adapter_folder(
    adapted: PeftModel, vlm: VisionLanguageModel, plan: LayerPlan, config: LoraConfig, run: RunFolder
) -> None:
    """Weights, configuration, processor, and the logits a reload must give."""
    from vfl_train.hub.load import CONFIG, WEIGHTS
    from vfl_train.hub.samples import REFERENCE, make_reference
    from vfl_train.training.adapter import adapter_config, adapter_weights

    run.write_bytes(WEIGHTS, adapter_weights(adapted))
    run.write_json(CONFIG, adapter_config(adapted, plan, vlm.name_or_path, vlm.revision))
    if world().is_main:
        vlm.processor.save_pretrained(run.folder)
    run.write_json(REFERENCE, make_reference(adapted, vlm.processor))
    run.write_text("train_config.yaml", _train_config(config))


def _public(value: Any) -> Any:
    from vfl_train.hub.privacy import public_values

    return public_values(value)


def _train_config(config: LoraConfig) -> str:
    """The settings as a recipe section; paths of this machine cut to their last part."""
    left_out = ("output", "overwrite", "dry_run")
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in left_out}
    return yaml.safe_dump({"lora": _public(values)}, sort_keys=False, allow_unicode=True)


def _write_card(
    plan: LayerPlan, config: LoraConfig, dataset: TrainingRows, metrics: dict[str, float], run: RunFolder
) -> None:
    from vfl_train.hub.card import adapter_card, unpublished

    training = {
        "rows": f"{len(dataset.rows)} (sha256 of the data {dataset.sha256[:12]})",
        "optimizer steps": _steps(config, metrics),
        "rows a step": config.per_device_train_batch_size * config.gradient_accumulation_steps * world().size,
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        "mean loss (nats per answer token)": f"{metrics['train_loss']:.4f}",
        **_validated(config, dataset, metrics),
        "seconds": f"{metrics['train_runtime']:.0f}",
        "seed": config.seed,
        "versions": ", ".join(f"{k} {v}" for k, v in run.fingerprint["versions"].items()),
    }
    if profile := run.fingerprint["inputs"].get("profile"):
        training["profile"] = f"sha256 {profile[:12]}"
    public = unpublished(plan.model.name_or_path, plan.model.revision, (config.data,))
    run.write_text("README.md", adapter_card(plan, training, config.lora_r, config.lora_alpha, public))


def _steps(config: LoraConfig, metrics: dict[str, float]) -> str:
    done, planned = int(metrics["steps"]), int(metrics["planned_steps"])
    if done >= planned:
        return str(done)
    patience = config.early_stopping_patience
    return f"{done} of {planned}: stopped early, no lower validation loss in {patience} validations"


def _validated(config: LoraConfig, dataset: TrainingRows, metrics: dict[str, float]) -> dict[str, str]:
    """What the card says of the validation rows."""
    if dataset.validation is None or "eval_step" not in metrics:
        return {}
    kept = ", kept" if config.load_best_model_at_end else ""
    found = f"{metrics['eval_loss']:.4f} at step {metrics['eval_step']:.0f}{kept}"
    return {"validation rows": str(len(dataset.validation.rows)), "lowest validation loss": found}
