"""What the processes of a run must have in common before step 1, and what they watch together in it.

A process with other rows, settings or initial weights trains another model, silently, or waits for the others
for ever. Both are found out here, while it costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from vfl_train.errors import DataError
from vfl_train.training.distributed import agree, exchange, note_step, world

if TYPE_CHECKING:
    from peft import PeftModel

    from vfl_train.config import LoraConfig
    from vfl_train.data.rows import Row
    from vfl_train.training.plan import LayerPlan


def agree_before_training(
    config: LoraConfig, rows: Sequence[Row], data_sha256: str, plan: LayerPlan, model: PeftModel
) -> None:
    """Compare rows, settings, plan and initial adapter of all processes. Paths may differ from node to node.

    Raises:
        DataError: fewer rows than processes.
        DistributedError: naming what differs, and its value on two ranks.
    """
    size = world().size
    if size == 1:
        return
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    facts: dict[str, Any] = {"the number of usable rows": len(rows)}
    facts |= {f"the setting {k}": v for k, v in settings.items() if not isinstance(v, Path) and k != "data"}
    facts |= {
        "the data": data_sha256,
        "the rows with images": sum(bool(row.pictures) for row in rows),
        "the plan": list(plan.module_names),
        "the initial adapter": initial_state(
            [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        ),
    }
    agree(facts, "what they train on")
    if len(rows) < size:
        raise DataError(
            f"{len(rows)} usable rows for {size} processes: {size - len(rows)} would have none",
            f"use at most {max(1, len(rows))} processes",
        )


def initial_state(parameters: Sequence[tuple[str, torch.Tensor]]) -> str:
    """sha256 over the names and values of parameters."""
    digest = hashlib.sha256()
    for name, value in parameters:
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_steps(batches: int) -> None:
    """Every process has equally many micro-batches an epoch; one with more would wait for others for ever.

    Raises DataError with the count of every rank."""
    counts = exchange(batches, "the count of batches")
    if len(set(counts)) > 1 or not all(counts):
        listed = ", ".join(f"rank {rank} has {n}" for rank, n in enumerate(counts))
        raise DataError(f"the processes do not have equally many batches: {listed}", "share the rows evenly")


class EqualSteps(TrainerCallback):
    """`check_steps` when everything is set up; afterwards, where this process is, for who looks for it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader = kwargs.get("train_dataloader")
        if world().size > 1 and loader is not None:
            check_steps(len(loader))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note_step(state.global_step)


class GradientWatch:
    """Which parameters have had a gradient that is not zero, in any process. It looks at what autograd hands
    over, so that it sees the same with and without DDP and ZeRO, which keeps no `grad`."""

    def __init__(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        self.seen: dict[str, torch.Tensor | None] = {name: None for name, _ in parameters}
        self._handles = [p.register_hook(partial(self._note, name)) for name, p in parameters]

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        found, before = gradient.detach().any(), self.seen[name]
        self.seen[name] = found if before is None else before | found

    def finish(self) -> list[str]:
        """Stop watching; names of the parameters without a gradient anywhere. All processes must call."""
        for handle in self._handles:
            handle.remove()
        silent = [name for name, found in self.seen.items() if found is None or not bool(found)]
        everywhere = set.intersection(*map(set, exchange(silent, "the first gradients")))
        return [name for name in self.seen if name in everywhere]


def all_windows(window: Sequence[tuple[list[int], torch.Tensor]]) -> list[tuple[list[int], float]]:
    """Rows and loss of every micro-batch of this optimizer step, from all processes. All must call."""
    own = [[rows, str(float(loss))] for rows, loss in window]  # JSON has no NaN
    return [(rows, float(loss)) for each in exchange(own, "the losses of a step") for rows, loss in each]
