"""TRL's SFTTrainer on rows that this package reads: the smallest subclass that does it.

Row images are opened in the collator, batch by batch. The loss covers the answer mask only. Nothing is
checkpointed in the sense of recomputation, and nothing below the lowest adapted layer requires grad, so
backward visits the adapted layers and those above them, never the vision tower.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import datasets
import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vfl_train.errors import DataError
from vfl_train.training.adapter import check_finite, trainable_parameters
from vfl_train.training.agreement import EqualSteps
from vfl_train.training.deepspeed import in_training_dtype, settings_of
from vfl_train.training.distributed import keep, lost_processes, world
from vfl_train.training.guards import LogFile, StepGuard
from vfl_train.training.reporting import TENSORBOARD, tensorboard, trackers
from vfl_train.training.resume import Checkpoints, ResumableTrainer

if TYPE_CHECKING:
    from pathlib import Path

    from vfl_train.config import LoraConfig
    from vfl_train.data.rows import Row
    from vfl_train.training.curves import TrainingCurves
    from vfl_train.training.validation import Validation

ROWS = "rows"  # batch entry with the row numbers, taken out before the model sees the batch


class RowCollator:
    """Turns [{"row": 3}, ...] into a batch of `collate`, with the rows' numbers beside the tensors."""

    def __init__(self, rows: Sequence[Row], collate: Callable[[list[Row]], dict[str, Any]]) -> None:
        self.rows, self.collate = rows, collate

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        chosen = [self.rows[item["row"]] for item in items]
        return {**self.collate(chosen), ROWS: [row.row for row in chosen]}


class LoraTrainer(ResumableTrainer, SFTTrainer):
    """SFTTrainer that tells a `StepGuard` which rows a loss came from, and sends no telemetry."""

    def __init__(self, guard: StepGuard, curves: TrainingCurves | None = None, **kwargs: Any) -> None:
        self.guard, self.curves = guard, curves
        adapter = [(p, p.data) for _, p in trainable_parameters(kwargs["model"])]
        super().__init__(callbacks=[guard], **kwargs)
        for parameter, values in adapter:
            if parameter.dtype != values.dtype:
                parameter.data = values  # TRL rounds the adapter of a quantized model to bfloat16
        self.remove_callback(PrinterCallback)
        # TRL divides by the answer tokens of the whole optimizer step if it is told their number; several
        # vision-language models say they do not take it, which would average unequal micro-batches alike.
        self.model_accepts_loss_kwargs = True
        self.add_callback(EqualSteps())

    def _send_telemetry(self) -> None:
        pass

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.guard.rows = inputs.pop(ROWS)
        if self.curves is not None:
            self.curves.begin_batch(self.guard.rows, inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Here and not in training_step: under DeepSpeed the optimizer step is part of that.
        result = super().compute_loss(*args, **kwargs)
        self.guard.add(result[0] if isinstance(result, tuple) else result)
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.curves is not None and "loss" in logs:
            logs.update(self.curves.logged())
        super().log(logs, *args, **kwargs)


def autocast_of(config: LoraConfig, device: torch.device) -> torch.dtype | None:
    """The dtype that training computes in where the model's is another; None: none."""
    enabled = device.type != "cpu" if config.bf16 is None else config.bf16
    return torch.bfloat16 if enabled else None


def training_arguments(config: LoraConfig, device: torch.device, folder: str) -> SFTConfig:
    """TRL's arguments for a run on `device`; `folder` is scratch, nothing of value is written there."""
    on_cpu = device.type == "cpu"
    settings: dict[str, Any] = dict(
        output_dir=folder,
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,  # below 1: a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        report_to=[name for name in trackers(config.report_to) if name != TENSORBOARD],
        dataloader_num_workers=config.dataloader_num_workers,
        seed=config.seed,
        data_seed=config.seed,
        bf16=autocast_of(config, device) is not None,
        use_cpu=on_cpu,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_nan_inf_filter=False,
        gradient_checkpointing=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        router_aux_loss_coef=0.0,  # the routers are frozen: the loss is that of the answers alone
        ddp_find_unused_parameters=bool(config.also_adapt),  # a text batch leaves the vision tower out
        ddp_timeout=config.ddp_timeout,
        average_tokens_across_devices=True,
        deepspeed=settings_of(config),
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=not (sys.stderr.isatty() and world().is_main),
    )
    with warnings.catch_warnings():  # TRL still names its default by the deprecated key
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        arguments = SFTConfig(**settings)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: never nn.DataParallel
    return arguments


def train(
    model: PeftModel,
    processor: Any,
    rows: Sequence[Row],
    collate: Callable[[list[Row]], dict[str, Any]],
    config: LoraConfig,
    log_path: Path,
    checkpoints: Checkpoints | None = None,
    curves: TrainingCurves | None = None,
    validation: Validation | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train the adapter of `model` in place on `rows`; the order of rows follows from `config.seed`. With
    `checkpoints` it goes on from the newest valid one, and SIGTERM and Ctrl-C wait for one. `curves` and
    `validation` log the loss of each function and of held-out rows.

    Returns:
        TRL's final metrics: train_loss (nats per answer token), train_runtime (seconds), ...; with `steps`,
        those taken, and `planned_steps`; and of the validation eval_loss and eval_step.

    Raises:
        DataError: no rows.
        NumericError: a non-finite loss, gradient or parameter, or a planned module without gradient.
    """
    if not rows:
        raise DataError("there are no rows to train on", "see quarantine.jsonl for the reasons")
    torch.set_flush_denormal(True)  # without it CPUs crawl through the first steps
    in_training_dtype(model, settings_of(config))
    guard = StepGuard(trainable_parameters(model))
    with tempfile.TemporaryDirectory(prefix="vfl-train-") as scratch:
        trainer = LoraTrainer(
            model=model,
            args=training_arguments(config, model.device, scratch),
            data_collator=RowCollator(rows, collate),
            # TRL takes a datasets.Dataset only; this one holds row numbers, in memory
            train_dataset=datasets.Dataset.from_dict({"row": list(range(len(rows)))}),
            processing_class=processor,
            guard=guard,
            curves=curves,
        )
        for watcher in (curves, validation):
            if watcher is not None:
                watcher.trainer = trainer
                trainer.add_callback(watcher)
        for callback in callbacks:
            trainer.add_callback(callback)
        if TENSORBOARD in trackers(config.report_to) and world().is_main:
            trainer.add_callback(tensorboard(log_path.with_name(TENSORBOARD)))
        found = trainer.attach(checkpoints) if checkpoints is not None else None
        trainer.add_callback(LogFile(log_path))
        try:
            with lost_processes(), checkpoints.interrupts if checkpoints else nullcontext():
                metrics = trainer.train(resume_from_checkpoint=found).metrics
        finally:
            _restore_forward(model)
        keep(trainer.deepspeed)  # what saves the adapter still gathers through it
    check_finite(model)
    model.eval()
    steps = {"steps": trainer.state.global_step, "planned_steps": trainer.state.max_steps}
    return {**metrics, **steps, **(validation.summary() if validation is not None else {})}


def _restore_forward(model: PeftModel) -> None:
    """Take off the fused loss head that TRL put on the base model and the autocast that accelerate put on the
    adapted one, so that forward gives logits as before."""
    for module in (model, model.get_base_model()):
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_original_forward", None)
