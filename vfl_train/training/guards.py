"""What is watched while training: finite numbers, gradients where the plan wants them, and the log.

TRL and transformers log a NaN loss as the average of earlier ones, or as 0.0, and save the result as if
nothing had happened. Here every optimizer step is checked before it is taken: one synchronisation a step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vfl_train.errors import NumericError
from vfl_train.training.agreement import GradientWatch, all_windows
from vfl_train.training.deepspeed import norm_of_step

_ROWS_NAMED = 32


class StepGuard(TrainerCallback):
    """Stops at an optimizer step that would use a non-finite loss or gradient, naming the rows of the batch,
    and after the first backward if a planned LoRA module got no gradient.

    A non-finite activation is one of these: it reaches the loss, or the gradient by 0 * NaN. ZeRO takes the
    step inside backward, so there the parameters may be spoilt by then; they are never saved.
    """

    def __init__(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        self.parameters = list(parameters)
        self.window: list[tuple[list[int], torch.Tensor]] = []  # rows and loss of each micro-batch
        self.rows: list[int] = []  # of the micro-batch that is being computed
        # Not A: with B zero, as it begins, its first gradient is zero too.
        self.watch: GradientWatch | None = GradientWatch([(n, p) for n, p in parameters if ".lora_B." in n])

    def add(self, loss: torch.Tensor) -> None:
        """Note the loss (scalar) of a micro-batch of the current optimizer step, that of `rows`."""
        self.window.append((self.rows, loss.detach()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises NumericError."""
        if self.watch is not None:
            silent, self.watch = self.watch.finish(), None
            if silent:
                raise NumericError(
                    f"no gradient reached {silent[0]} in the first step: it would not be trained",
                    "check that the answers depend on this layer and that the rows have answers",
                )
        losses = torch.stack([loss.float() for _, loss in self.window])
        norm = self._gradient_norm(kwargs.get("optimizer"))
        if not math.isfinite((losses.sum() + norm.to(losses.device)).item()):
            self._stop(math.isfinite(norm.item()), state.global_step + 1)
        self.window.clear()

    def _gradient_norm(self, optimizer: Any) -> torch.Tensor:
        """Norm of all gradients together, the same in every process."""
        norm = norm_of_step(optimizer)
        if norm is not None:
            return torch.tensor(norm if norm >= 0 else math.nan)  # ZeRO says -1 for an overflow
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).float()

    def _stop(self, finite_gradient: bool, step: int) -> None:
        # A gradient is that of all processes, so all of them are here; a loss alone is that of this one.
        own = [(rows, loss.item()) for rows, loss in self.window]
        window = own if finite_gradient else all_windows(self.window)
        bad = [rows for rows, loss in window if not math.isfinite(loss)]
        rows = [row for group in bad or [rows for rows, _ in window] for row in group]
        named = ", ".join(map(str, rows[:_ROWS_NAMED])) + (" ..." if len(rows) > _ROWS_NAMED else "")
        raise NumericError(
            f"the {'loss' if bad else 'gradient'} is not finite at step {step}, in the batch of rows "
            f"{named}; nothing of it was saved",
            "look at these rows, or lower learning_rate",
        )


class LogFile(TrainerCallback):
    """`train_log.jsonl`: one object a log event, on disk as soon as it is known. A resumed run keeps the
    entries up to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file, or cut what is younger than the checkpoint."""
        if not state.is_world_process_zero:
            return
        kept = list(_entries(self.path, state.global_step)) if state.global_step else []
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self.start = time.monotonic() - (kept[-1]["seconds"] if kept else 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 2), **logs}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({k: _finite(v) for k, v in entry.items()}) + "\n")


def _entries(path: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """Entries of an interrupted run's log up to `last_step`, without a summary and a torn last line."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if entry["step"] <= last_step and "train_runtime" not in entry:
            yield entry


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
