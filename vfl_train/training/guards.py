"""What is watched while training: finite numbers, gradients where the plan wants them, and the log.

TRL and transformers log a NaN loss as the average of earlier ones, or as 0.0, and save the result as if
nothing had happened. Here every optimizer step is checked before it is taken: one synchronisation a step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vfl_train.errors import NumericError

_ROWS_NAMED = 32


class StepGuard(TrainerCallback):
    """Stops before an optimizer step that would use a non-finite loss or gradient, naming the rows of the
    batch, and after the first backward if a planned LoRA module got no gradient."""

    def __init__(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        self.parameters = list(parameters)
        self.window: list[tuple[list[int], torch.Tensor]] = []  # rows and loss of each micro-batch
        self.audited = False

    def add(self, rows: list[int], loss: torch.Tensor) -> None:
        """Note a micro-batch of the current optimizer step: its row numbers and its loss (scalar)."""
        self.window.append((rows, loss))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        losses = torch.stack([loss.float() for _, loss in self.window])
        if not self.audited:
            self._audit()
        norm = torch.nn.utils.get_total_norm(gradients).float()
        if not math.isfinite((losses.sum() + norm.to(losses.device)).item()):
            self._stop(losses, state.global_step + 1)
        self.window.clear()

    def _audit(self) -> None:
        """Every planned LoRA B has a non-zero gradient after the first backward (its A cannot, B being 0)."""
        for name, parameter in self.parameters:
            if ".lora_B." in name and (parameter.grad is None or not bool(parameter.grad.any())):
                raise NumericError(
                    f"no gradient reached {name} in the first step: it would not be trained",
                    "check that the answers depend on this layer and that the rows have answers",
                )
        self.audited = True

    def _stop(self, losses: torch.Tensor, step: int) -> None:
        groups = [rows for rows, _ in self.window]
        bad = [rows for rows, loss in zip(groups, losses.tolist(), strict=True) if not math.isfinite(loss)]
        what = "loss" if bad else "gradient"
        rows = [row for group in bad or groups for row in group]
        named = ", ".join(map(str, rows[:_ROWS_NAMED])) + (" ..." if len(rows) > _ROWS_NAMED else "")
        raise NumericError(
            f"the {what} is not finite at step {step}, in the batch of rows {named}; nothing was saved",
            "look at these rows, or lower learning_rate",
        )


class LogFile(TrainerCallback):
    """`train_log.jsonl`: one object a log event, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        path.write_text("", encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 2), **logs}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({k: _finite(v) for k, v in entry.items()}) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
