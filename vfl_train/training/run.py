"""`vfl-train lora`: rows and a layer plan in, an adapter folder out."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vfl_train.errors import ConfigError, DataError
from vfl_train.hub.load import profile_file
from vfl_train.options import format_layers
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import Profile
from vfl_train.training.plan import LayerPlan, build_plan, choose_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from vfl_train.config import LoraConfig
    from vfl_train.data.readers import Dataset
    from vfl_train.models import VisionLanguageModel

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
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
    from vfl_train.models.digest import model_digest

    _refuse_unbuilt(config)
    source = profile_file(config.profile) if config.profile else None
    profile = Profile.load(source) if source else None
    dataset = _read_rows(config)
    if config.dry_run:
        _dry_run(config, profile, len(dataset.rows))
        return Path(config.output)
    vlm, plan = _load_and_plan(config, profile)
    inputs = {
        "data": dataset.sha256, "profile": file_sha256(source) if source else "", "model": model_digest(vlm),
    }  # fmt: skip
    wanted = fingerprint("lora", config, inputs, _PACKAGES)
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if run.already_done:
            log.info("%s: already done", run.folder)
        else:
            _train_and_save(config, profile, dataset, vlm, plan, run)
    return run.folder


def _refuse_unbuilt(config: LoraConfig) -> None:
    """Raises ConfigError for what is designed and not there yet."""
    asked = {
        "--deepspeed": config.deepspeed is not None,
        "--num-processes above 1": (config.num_processes or 1) > 1,
        "--per-function": config.per_function,
        "--also-adapt": bool(config.also_adapt),
        "--max-length": config.max_length is not None,
        "--eval-data and --eval-share": config.eval_data is not None or config.eval_share > 0,
        "--activation-checkpointing": config.activation_checkpointing,
        "--attn-implementation": config.attn_implementation != "sdpa",
        "--cache-prefix": config.cache_prefix,
        "--load-in-4bit": config.load_in_4bit,
        "--save-steps": config.save_steps > 0,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ConfigError(f"{option} is not available yet", "leave it out")


def _read_rows(config: LoraConfig) -> Dataset:
    from vfl_train.data.readers import read_dataset

    dataset = read_dataset(Path(config.data), image_root=config.image_root, limit=config.limit)
    if not dataset.rows:
        first = dataset.rejected[0] if dataset.rejected else None
        reason = f"row {first.row}: {first.detail}" if first else "it is empty"
        raise DataError(f"{config.data} has no usable row: {reason}", "run vfl-train data check")
    return dataset


def _make_plan(config: LoraConfig, profile: Profile | None, vlm: VisionLanguageModel) -> LayerPlan:
    choice = choose_layers(
        vlm.info,
        profile=profile,
        functions=config.functions,
        layers=config.layers,
        layer_rule=config.layer_rule,
        control=config.control,
        seed=config.seed,
    )
    for warning in choice.warnings:
        log.warning("%s", warning)
    return build_plan(choice, vlm, config.lora_r)


def _dry_run(config: LoraConfig, profile: Profile | None, rows: int) -> None:
    from vfl_train.training.preview import print_plan
    from vfl_train.training.skeleton import load_skeleton

    vlm = load_skeleton(config.model, config.revision)
    print_plan(_make_plan(config, profile, vlm), config, rows)


def _load_and_plan(config: LoraConfig, profile: Profile | None) -> tuple[VisionLanguageModel, LayerPlan]:
    """Everything that may be refused, before the output folder is touched."""
    from vfl_train.models import VisionLanguageModel

    vlm = VisionLanguageModel.load(
        config.model, revision=config.revision, dtype=config.dtype, device=config.device,
        max_pixels=config.max_pixels,
    )  # fmt: skip
    return vlm, _make_plan(config, profile, vlm)


def _train_and_save(
    config: LoraConfig,
    profile: Profile | None,
    dataset: Dataset,
    vlm: VisionLanguageModel,
    plan: LayerPlan,
    run: RunFolder,
) -> None:
    from vfl_train.data.collator import Collator
    from vfl_train.data.readers import write_quarantine
    from vfl_train.training.adapter import apply_lora
    from vfl_train.training.trainer import train

    run.write_json("plan.json", _public(plan.to_json()))
    if dataset.rejected:
        write_quarantine(dataset.rejected, run.path("quarantine.jsonl"))
    adapted = apply_lora(
        vlm.model, plan, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
        seed=config.seed,
    )  # fmt: skip
    collate = Collator(vlm.encoder)
    metrics = train(adapted, vlm.processor, dataset.rows, collate, config, run.path("train_log.jsonl"))
    if profile is not None:
        run.write_json("profile.json", _public(profile.to_json()))
    save_adapter_folder(adapted, vlm, plan, config, run)
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
    plan: LayerPlan, config: LoraConfig, dataset: Dataset, metrics: dict[str, float], run: RunFolder
) -> None:
    from vfl_train.hub.card import adapter_card

    training = {
        "rows": f"{len(dataset.rows)} (sha256 of the data {dataset.sha256[:12]})",
        "optimizer steps": steps_of(config, len(dataset.rows)),
        "rows a step": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        "mean loss (nats per answer token)": f"{metrics['train_loss']:.4f}",
        "seconds": f"{metrics['train_runtime']:.0f}",
        "seed": config.seed,
        "versions": ", ".join(f"{k} {v}" for k, v in run.fingerprint["versions"].items()),
    }
    run.write_text("README.md", adapter_card(plan, training, config.lora_r, config.lora_alpha))


def steps_of(config: LoraConfig, rows: int) -> int:
    """Optimizer steps of a run over `rows` rows, counted as transformers does."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-rows // config.per_device_train_batch_size)
    steps_an_epoch = max(1, -(-batches // config.gradient_accumulation_steps))
    return max(1, -int(-config.num_train_epochs * steps_an_epoch // 1))
