"""Saving a run while it trains and going on from what was saved.

`Checkpoints` says when a checkpoint is due and what is in it; `ResumableTrainer` puts it in the place of the
checkpoints of transformers' trainer and of DeepSpeed, none of whose files are ever written or read. What a
resumed run does is what the uninterrupted one would have done, to the bit on a CPU: parameters, optimizer,
learning rate, random generators, order of rows, sums of the log, and the state of callbacks that are
transformers' ExportableState (those with `load_state(attributes)` get it back through that).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from vfl_train.errors import VerificationError
from vfl_train.fingerprints import allowed_keys, refuse_differences
from vfl_train.runs import CHECKPOINTS, RunFolder, dumps
from vfl_train.training import checkpoint, state
from vfl_train.training.adapter import trainable_parameters
from vfl_train.training.distributed import exchange, world
from vfl_train.training.interrupts import Interrupts, shield_worker

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig

TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"
_FIXED_BYTES = 4 << 20  # allowed for JSON files that grow with the run
log = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """Commits a checkpoint every `every` steps (0: none on the way), at the end, and when a signal asks to
    stop. At the end of an epoch it waits for the validation there, which belongs to that step.

    Args:
        root: the run's folder of checkpoints.
        fingerprint: of the run; a checkpoint of another one is refused.
        extra: files that make each checkpoint a loadable adapter: configuration, processor, chat template.
        keep: how many stay.
        allowed: keys of the fingerprint that may differ from the checkpoint's (--allow-config-change).
    """

    def __init__(
        self,
        root: Path,
        fingerprint: Mapping[str, Any],
        extra: Mapping[str, bytes],
        every: int = 0,
        keep: int = 2,
        allowed: Collection[str] = (),
    ) -> None:
        self.root, self.fingerprint, self.extra = root, fingerprint, dict(extra)
        self.every, self.keep, self.allowed = every, keep, allowed
        self.changed: tuple[str, ...] = ()  # of them, those that do differ
        self.interrupts = Interrupts()
        self.trainer: Any = None  # set by the trainer, which is made later
        self.found: checkpoint.Checkpoint | None = None
        self.finished = False  # the checkpoint is that of the end of training
        self._earlier, self._begun = 0.0, time.monotonic()
        self._stop = 0
        self._progress: dict[str, Any] = {}

    @classmethod
    def of(cls, run: RunFolder, config: LoraConfig, extra: Mapping[str, bytes]) -> Checkpoints:
        """The checkpoints of a run folder, as `config` wants them."""
        # Not only what differs from the last attempt: that one may have ended before it saved anything.
        allowed = allowed_keys(run.fingerprint, config.allow_config_change)
        root = run.folder / CHECKPOINTS
        return cls(root, run.fingerprint, extra, config.save_steps, config.save_total_limit, allowed)

    def find(self) -> Path | None:
        """The folder of the newest valid checkpoint, if there is one. What is newer and damaged is named,
        what an interrupted save left is removed.

        Raises:
            ConfigError: it is of a run with other settings, naming key, old and new value.
            VerificationError: there are checkpoints, and none of them is whole.
            DiskError: the folder is not writable.
        """
        name = None
        if world().is_main:
            checkpoint.clean(self.root)
            found = checkpoint.newest_valid(self.root)
            for skipped, reason in found.skipped:
                log.warning("checkpoint %s is passed over: %s", skipped, reason)
            if found.skipped and found.checkpoint is None:
                raise VerificationError(
                    f"none of the checkpoints in {self.root} is whole", "--overwrite starts again from step 1"
                )
            name = found.checkpoint.folder.name if found.checkpoint else None
        name = exchange(name, "the checkpoint")[0]
        if name is None:
            return None
        self.found = checkpoint.read(self.root / name)
        place = f"checkpoint {self.found.folder.name}"
        wanted = json.loads(dumps(self.fingerprint))
        self.changed = refuse_differences(place, self.found.fingerprint, wanted, self.allowed, True)
        log.info("resuming from checkpoint %s", self.found.folder.name)
        return self.found.folder

    def check_room(self) -> None:
        """Raises DiskError unless the disk takes the checkpoints of this run, by their measured size: tensors
        of the adapter and of its optimizer (two float32 moments), and the files beside them."""
        numbers = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainable_parameters(self.trainer.model))
        size = numbers * 4 * 3 + sum(map(len, self.extra.values())) + _FIXED_BYTES
        if world().is_main:
            checkpoint.require_room(self.root, size, self.keep if self.every else 1)

    # --- when ----------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark a checkpoint as due after this step; never inside an optimizer step."""
        self._stop = self._agreed_signal()
        due = bool(self._stop) or (self.every > 0 and state.global_step % self.every == 0)
        at_an_edge = float(state.epoch).is_integer() or control.should_training_stop
        if due and not at_an_edge:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same where an epoch or the training ends."""
        due = self.every > 0 and state.global_step % self.every == 0
        if self._stop or due or control.should_training_stop:
            control.should_save = True

    def _agreed_signal(self) -> int:
        """The signal that any process got, known to all of them at the same step."""
        number = self.interrupts.number
        if world().size == 1:
            return number
        import torch

        accelerator = self.trainer.accelerator
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max().item())

    # --- saving --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Commit the present state as a checkpoint; all processes must call it. Then, if a signal asked to
        stop, let it. Raises DiskError, NumericError, VerificationError."""
        trainer, step = self.trainer, self.trainer.state.global_step
        files = {**self.extra, **self._state_files(trainer)}
        failure: Exception | None = None
        if world().is_main:
            try:
                folder = checkpoint.save(self.root, step, files, self.fingerprint, self.keep)
                log.debug("checkpoint %s", folder)
            except Exception as e:
                failure = e
        answers = exchange([failure is not None, self.interrupts.number], "the checkpoint")
        if failure is not None:
            raise failure
        if answers[0][0]:
            raise SystemExit(1)  # the first process says why
        stop = max(self._stop, *(number for _, number in answers))
        if stop:  # also a signal that arrived while saving
            log.warning("stopped after step %d, which is saved: the same command goes on from there", step)
            self.interrupts.deliver(stop)

    def _state_files(self, trainer: Any) -> dict[str, bytes]:
        parameters = trainable_parameters(trainer.model)
        trainer.store_flos()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        own = {**state.random_state(), "loss": state.float_bytes(trainer._tr_loss.item())}
        progress = {
            "finished": trainer.control.should_training_stop,
            "seconds": self._earlier + time.monotonic() - self._begun,
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],
            "tokens": trainer._total_train_tokens,
        }
        return {
            state.WEIGHTS: state.parameter_bytes(parameters),
            **state.optimizer_files(trainer.optimizer, parameters),
            state.SCHEDULER: state.scheduler_file(trainer.lr_scheduler),
            state.RANDOM: state.rank_file(own),
            TRAINER_STATE: dumps(dataclasses.asdict(trainer.state), TRAINER_STATE).encode("utf-8"),
            PROGRESS: dumps(progress, PROGRESS).encode("utf-8"),
        }

    # --- resuming ------------------------------------------------------------------------------------

    def restore(self, folder: Path) -> None:
        """Put the trainer, whose model and optimizer are prepared, where the checkpoint left it.

        Raises VerificationError if the checkpoint does not fit the plan."""
        trainer, keep_settings = self.trainer, bool(self.changed)
        parameters = trainable_parameters(trainer.model)
        state.load_parameters(folder, parameters)
        state.load_optimizer(folder, trainer.optimizer, parameters, keep_settings)
        state.load_scheduler(folder, trainer.lr_scheduler, keep_settings)
        self._progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        # With other settings, such as more steps, there may be something left to do.
        self.finished = self._progress["finished"] and not self.changed
        self._earlier = self._progress["seconds"]
        for callback in trainer.callback_handler.callbacks:
            saved = trainer.state.stateful_callbacks.get(type(callback).__name__)
            if saved is not None and hasattr(callback, "load_state"):
                callback.load_state(saved["attributes"])

    def restore_random(self, folder: Path) -> None:
        """Put this process's random generators where the checkpoint left them."""
        saved = state.load_rank(folder, world().rank)
        if saved:
            state.set_random_state(saved)
        else:  # more processes than before, which --allow-config-change permitted
            log.warning("rank %d has no random state in %s", world().rank, folder.name)

    def on_train_begin(self, args: Any, state_: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the sums behind the log, which the trainer has just set to zero."""
        self._begun = time.monotonic()
        if self.found is None:
            return
        trainer, progress = self.trainer, self._progress
        saved = state.load_rank(self.found.folder, world().rank)
        trainer._tr_loss.fill_(state.bytes_float(saved["loss"]) if saved else 0.0)
        trainer._total_loss_scalar = progress["total_loss"]
        trainer._globalstep_last_logged = progress["last_logged"]
        trainer._initial_global_step = 0
        trainer._total_train_tokens = progress["tokens"]
        trainer._metrics["train"].update({name: list(values) for name, values in progress["metrics"].items()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Count the time before the interruption too: the trainer knows of the present process only."""
        if logs and "train_runtime" in logs and self._earlier:
            now = logs["train_runtime"]
            logs["train_runtime"] = round(now + self._earlier, 4)
            for key in ("train_samples_per_second", "train_steps_per_second"):
                logs[key] = round(logs[key] * now / logs["train_runtime"], 3)


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are those of `checkpoints`, if that is set."""

    checkpoints: Checkpoints | None = None

    def attach(self, checkpoints: Checkpoints) -> str | None:
        """Save through `checkpoints`. Returns the folder of the one to resume from, if there is one.

        Raises:
            ConfigError: that one is of a run with other settings.
            VerificationError: there are checkpoints, and none of them is whole.
            DiskError: there is no room for the checkpoints of this run.
        """
        checkpoints.trainer, self.checkpoints = self, checkpoints
        self.add_callback(checkpoints)
        found = checkpoints.find()
        checkpoints.check_room()
        return str(found) if found else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save()

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        base.worker_init_fn = partial(shield_worker, base.worker_init_fn)
        return loader

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # everything is loaded when model and optimizer have been prepared

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        # Without the folder: transformers would look for its own files there, and DeepSpeed for its.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None and self.checkpoints is not None:
            self.checkpoints.restore(Path(resume_from_checkpoint))
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.checkpoints is not None:
            self.checkpoints.restore_random(Path(checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers takes one step more when it resumes from the last one
        ended = self.checkpoints is not None and self.checkpoints.finished
        if ended or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def adapter_files(config: Mapping[str, Any], processor: Any) -> dict[str, bytes]:
    """What stands beside the weights of an adapter: `adapter_config.json`, processor and chat template."""
    with tempfile.TemporaryDirectory(prefix="vfl-train-") as scratch:
        processor.save_pretrained(scratch)
        files = [p for p in sorted(Path(scratch).rglob("*")) if p.is_file()]
        content = {p.relative_to(scratch).as_posix(): p.read_bytes() for p in files}
    return {"adapter_config.json": dumps(config).encode("utf-8"), **content}
