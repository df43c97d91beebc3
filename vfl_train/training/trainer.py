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
from typing import TYPE_CHECKING, Any

import datasets
import torch
from peft import PeftModel
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from vfl_train.errors import DataError
from vfl_train.training.adapter import check_finite, trainable_parameters
from vfl_train.training.guards import LogFile, StepGuard

if TYPE_CHECKING:
    from pathlib import Path

    from vfl_train.config import LoraConfig
    from vfl_train.data.rows import Row

ROWS = "rows"  # batch entry with the row numbers, taken out before the model sees the batch


class RowCollator:
    """Turns [{"row": 3}, ...] into a batch of `collate`, with the rows' numbers beside the tensors."""

    def __init__(self, rows: Sequence[Row], collate: Callable[[list[Row]], dict[str, Any]]) -> None:
        self.rows, self.collate = rows, collate

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        chosen = [self.rows[item["row"]] for item in items]
        return {**self.collate(chosen), ROWS: [row.row for row in chosen]}


class LoraTrainer(SFTTrainer):
    """SFTTrainer that tells a `StepGuard` which rows a loss came from, and sends no telemetry."""

    def __init__(self, guard: StepGuard, **kwargs: Any) -> None:
        self.guard = guard
        super().__init__(callbacks=[guard], **kwargs)
        self.remove_callback(PrinterCallback)
        # TRL divides by the answer tokens of the whole optimizer step if it is told their number; several
        # vision-language models say they do not take it, which would average unequal micro-batches alike.
        self.model_accepts_loss_kwargs = True

    def _send_telemetry(self) -> None:
        pass

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = inputs.pop(ROWS)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.add(rows, loss)
        return loss


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
        report_to=config.report_to,
        dataloader_num_workers=config.dataloader_num_workers,
        seed=config.seed,
        data_seed=config.seed,
        bf16=not on_cpu if config.bf16 is None else config.bf16,
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
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=not sys.stderr.isatty(),
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
) -> dict[str, float]:
    """Train the adapter of `model` in place on `rows`; the order of rows follows from `config.seed`.

    Returns:
        TRL's final metrics: train_loss (nats per answer token), train_runtime (seconds), ...

    Raises:
        DataError: no rows.
        NumericError: a non-finite loss, gradient or parameter, or a planned module without gradient.
    """
    if not rows:
        raise DataError("there are no rows to train on", "see quarantine.jsonl for the reasons")
    torch.set_flush_denormal(True)  # without it CPUs crawl through the first steps
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
        )
        trainer.add_callback(LogFile(log_path))
        try:
            metrics = trainer.train().metrics
        finally:
            _restore_forward(model)
    check_finite(model)
    model.eval()
    return metrics


def _restore_forward(model: PeftModel) -> None:
    """Take off the fused loss head that TRL put on the base model and the autocast that accelerate put on the
    adapted one, so that forward gives logits as before."""
    for module in (model, model.get_base_model()):
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_original_forward", None)
