"""Loss on held-out rows while training: which rows, how it is measured, and the adapter that did best.

The evaluation loop is our own: same collator and answer mask as in training, nothing but a forward, no
generation and no checkpoint of transformers' trainer. The loss is the mean over all answer tokens of all
validation rows, as the training loss is over those of an optimizer step.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from vfl_train.errors import ConfigError
from vfl_train.progress import track
from vfl_train.training.adapter import trainable_parameters
from vfl_train.training.best import BestAdapter
from vfl_train.training.curves import FunctionLosses, TrainingCurves
from vfl_train.training.deepspeed import settings_of
from vfl_train.training.mixed import same_modules
from vfl_train.training.prefix_store import image_digest

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

    from vfl_train.config import LoraConfig
    from vfl_train.data.rows import ImageRef, Row
    from vfl_train.models import VisionLanguageModel
    from vfl_train.training.rows import TrainingRows

log = logging.getLogger(__name__)


def watch(
    config: LoraConfig, vlm: VisionLanguageModel, rows: TrainingRows, model: PeftModel, checkpoints: Path
) -> tuple[TrainingCurves, Validation | None]:
    """What looks on while `rows` are trained on: curves of the functions, and the validation if there are
    rows for it. The best adapter is kept below `checkpoints`."""
    curves = TrainingCurves(rows.train.rows, rows.train.buckets, vlm.encoder.placeholder_ids)
    held = rows.validation
    if held is None:
        return curves, None
    best = None
    if config.load_best_model_at_end:
        best = BestAdapter(checkpoints / "best", trainable_parameters(model), config.save_total_limit)
    collate = same_modules(held.collator(vlm.encoder), held.rows, settings_of(config))
    return curves, Validation(held.rows, collate, config, held.buckets, best)


# --- which rows ------------------------------------------------------------------------------------


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), both in input order.

    Rows that share an image (by the bytes of its file), or text-only rows of the same content, are never
    parted. Which groups are held out follows from their content and `seed` alone, not from the row order: as
    many as fit into `share` of the rows, and at least one.

    Raises:
        ConfigError: nothing is left to train on.
    """
    groups = _groups(rows)
    quota = max(1, int(share * len(rows)))
    held: list[int] = []
    for key in sorted(groups, key=lambda k: hashlib.sha256(f"{seed}:{k}".encode()).digest()):
        if not held or len(held) + len(groups[key]) <= quota:
            held += groups[key]
    if len(held) == len(rows):
        raise ConfigError(
            f"--eval-share {share:g} leaves no row to train on: all {len(rows)} rows share images",
            "give the validation rows as --eval-data",
        )
    chosen = set(held)
    return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _groups(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Positions of the rows that belong together, by the smallest content hash among them."""
    digests = _image_digests(rows)
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    keys = [[digests[ref] for ref in row.pictures] or [_text_digest(row)] for row in rows]
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    groups = defaultdict(list)
    for index, (first, *_) in enumerate(keys):
        groups[root(first)].append(index)
    return groups


def _image_digests(rows: Sequence[Row]) -> dict[ImageRef, str]:
    refs = list(dict.fromkeys(ref for row in rows for ref in row.pictures))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(refs, track(pool.map(image_digest, refs), len(refs), "images"), strict=True))


def _text_digest(row: Row) -> str:
    return hashlib.sha256(repr([(m.role, m.text) for m in row.messages]).encode()).hexdigest()


# --- the loop --------------------------------------------------------------------------------------


class Validation(TrainerCallback, ExportableState):
    """Measures the loss on `rows` every `eval_steps` optimizer steps (0: after each epoch) and at the end,
    keeps the best adapter if `best` is given, and stops early if the configuration says so.

    Its state is part of a checkpoint: transformers' ExportableState.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[list[Row]], dict[str, Any]],
        config: LoraConfig,
        buckets: Mapping[int, str] | None = None,
        best: BestAdapter | None = None,
    ) -> None:
        self.rows, self.collate, self.config = list(rows), collate, config
        self.losses = FunctionLosses(buckets or {}, "eval_loss")
        self.best = best
        self.trainer: Any = None  # set by the trainer, which is made later
        self.best_loss, self.best_step = math.inf, 0
        self.last_step, self.since_best = -1, 0

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from; the tensors of the best adapter are a file of `best`."""
        attributes = {
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "best_step": self.best_step, "last_step": self.last_step, "since_best": self.since_best,
        }  # fmt: skip
        if self.best is not None:
            self.best.pin(self.best_step)
        return {"args": {}, "attributes": attributes}

    def load_state(self, attributes: Mapping[str, Any]) -> None:
        """Go on from the `attributes` of an earlier `state`."""
        loss = attributes["best_loss"]
        self.best_loss = math.inf if loss is None else float(loss)
        self.best_step, self.last_step = int(attributes["best_step"]), int(attributes["last_step"])
        self.since_best = int(attributes["since_best"])
        if self.best is not None and self.best_step and not self.best.has(self.best_step):
            log.warning("the adapter of step %s, the best so far, is gone: judged anew", self.best_step)
            self.best_loss, self.best_step, self.since_best = math.inf, 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.config.eval_steps
        if every and state.global_step % every == 0:
            self._judge(state.global_step, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.config.eval_steps:
            self._judge(state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._judge(state.global_step, control)
        if self.best is not None and self.config.load_best_model_at_end and self.best_step:
            self.best.restore(self.best_step)

    def summary(self) -> dict[str, float]:
        """The lowest validation loss and its step, for the card; empty before the first validation."""
        return {"eval_loss": self.best_loss, "eval_step": self.best_step} if self.best_step else {}

    def _judge(self, step: int, control: Any) -> None:
        if step == self.last_step:
            return
        self.last_step = step
        metrics = self.measure()
        self._log(metrics, control)
        loss = metrics["eval_loss"]
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.since_best = loss, step, 0
            if self.best is not None:
                self.best.keep(step)
            return
        self.since_best += 1
        if 0 < self.config.early_stopping_patience <= self.since_best:
            log.info("no lower validation loss in %d validations: stopped at step %d", self.since_best, step)
            control.should_training_stop = True

    def _log(self, metrics: dict[str, float], control: Any) -> None:
        """Log beside the training's own log: its sums stay, and so does a log that is due at this step."""
        due, model = control.should_log, self.trainer.model
        was_training = model.training
        model.eval()
        self.trainer.log(dict(metrics))
        model.train(was_training)
        control.should_log = due

    def measure(self) -> dict[str, float]:
        """{"eval_loss": nats per answer token, "eval_loss/<function>": ...} of the present adapter. All
        processes must call it; each measures its part of the rows."""
        trainer, model = self.trainer, self.trainer.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), trainer.compute_loss_context_manager():
                for rows, counts in self._batches(trainer.accelerator):
                    inputs = trainer._prepare_inputs(self.collate(rows))
                    output = model(**inputs, fused_lm_head=True, use_cache=False)
                    if counts:
                        self.losses.add([row.row for row in rows], output)
            metrics = self.losses.take(trainer.accelerator)
        finally:
            model.train(was_training)
        return metrics

    def _batches(self, accelerator: Any) -> Iterator[tuple[list[Row], bool]]:
        """This process's batches and whether they count: all processes run equally many, as sharded weights
        need, so some run the last one again for nothing."""
        size = self.config.per_device_train_batch_size
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        rounds = -(-len(batches) // world)
        turns: Iterable[int] = range(rounds)
        for turn in track(turns, rounds, "validation") if rank == 0 else turns:
            mine = turn * world + rank
            yield batches[min(mine, len(batches) - 1)], mine < len(batches)
