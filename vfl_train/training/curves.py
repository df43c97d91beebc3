"""What the training log says beside the mean loss: the loss of each function, and what a batch holds.

The mean loss of mixed rows hides that one function learns and another does not. Here every row's loss is
added to its function's, weighted by answer tokens; the sums stay on the device until something is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from vfl_train.errors import DataError
from vfl_train.training.distributed import world

if TYPE_CHECKING:
    from vfl_train.data.rows import Row

log = logging.getLogger(__name__)


class FunctionLosses:
    """Sums of loss and answer tokens by function. `buckets` maps row numbers to functions; rows without one
    count in the total only."""

    def __init__(self, buckets: Mapping[int, str], name: str) -> None:
        self.names = sorted(set(buckets.values()))
        self.index = {row: self.names.index(bucket) + 1 for row, bucket in buckets.items()}
        self.name = name
        self.sums: torch.Tensor | None = None  # [2, 1 + functions]: nats, answer tokens

    def add(self, rows: Sequence[int], output: Any) -> None:
        """Take in a forward of TRL's fused loss head on the rows: its log_probs and label_mask, [B, T]."""
        nats = -output.log_probs.detach().float().sum(1)
        tokens = output.label_mask.sum(1).to(nats.dtype)
        # A batch may have one sample more, which no loss covers (see `mixed`).
        names = [self.index.get(row, 0) for row in rows] + [0] * (len(nats) - len(rows))
        where = torch.tensor(names, device=nats.device)
        if self.sums is None:
            self.sums = torch.zeros(2, len(self.names) + 1, dtype=torch.float64)
        self.sums = self.sums.to(nats.device)
        self.sums.index_add_(1, where, torch.stack([nats, tokens]).double())

    def summed(self, accelerator: Any = None) -> torch.Tensor:
        """The sums [2, 1 + functions] over all processes of `accelerator`."""
        shape = (2, len(self.names) + 1)
        sums = torch.zeros(shape, dtype=torch.float64) if self.sums is None else self.sums
        if accelerator is None or accelerator.num_processes == 1:
            return sums
        return accelerator.reduce(sums.to(accelerator.device), reduction="sum")

    def take(self, accelerator: Any = None) -> dict[str, float]:
        """{name: mean over all answer tokens, name/<function>: ...} since the last call, over all processes
        of `accelerator`, and start anew. Without a single token: nothing."""
        nats, tokens = self.summed(accelerator).tolist()
        self.sums = None
        values = {
            f"{self.name}/{n}": (a, b) for n, a, b in zip(self.names, nats[1:], tokens[1:], strict=True)
        }
        every = {self.name: (sum(nats), sum(tokens)), **values}
        return {name: total / count for name, (total, count) in every.items() if count}


class TrainingCurves(TrainerCallback, ExportableState):
    """The same of training batches, read off the model's own forward and logged as `loss/<function>` (the
    total is the trainer's); and what the first batch holds. Sums not logged yet are part of a checkpoint.

    Args:
        rows: the training rows.
        buckets: function by row number, empty without them.
        placeholder_ids: tokens that stand for images.
    """

    def __init__(
        self, rows: Sequence[Row], buckets: Mapping[int, str], placeholder_ids: Collection[int] = ()
    ) -> None:
        known = {row.row for row in rows}
        self.losses = FunctionLosses({r: b for r, b in buckets.items() if r in known}, "loss")
        self.images = {row.row: len(row.pictures) for row in rows}
        self.placeholder_ids = placeholder_ids
        self.trainer: Any = None  # set by the trainer, which is made later
        self._batch: Sequence[int] = ()
        self._started = False
        self._remove: Callable[[], None] = lambda: None

    def begin_batch(self, rows: Sequence[int], inputs: Mapping[str, Any]) -> None:
        """A training batch of these rows comes next. Raises DataError if the first has no supervised one."""
        self._batch = rows
        if not self._started and self.trainer.state.global_step == 0:
            found = first_batch(rows, inputs, self.images, self.placeholder_ids)
            log.info("%s", first_batch_line(found))
            shown = {f"first_batch/{name}": value for name, value in found.items()}
            self.trainer.log({"rows": len(self.images), **shown})
        self._started = True

    def logged(self) -> dict[str, float]:
        """{loss/<function>: nats per answer token} since the last call; all processes must call it."""
        if not self.losses.names:
            return {}
        found = self.losses.take(self.trainer.accelerator)
        return {name: value for name, value in found.items() if name != self.losses.name}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the forwards of `model` from now on."""

        def seen(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if module.training and self._batch and getattr(output, "log_probs", None) is not None:
                self.losses.add(self._batch, output)
                self._batch = ()

        if self.losses.names:
            self._remove = model.register_forward_hook(seen).remove

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model."""
        self._remove()

    def state(self) -> dict[str, Any]:
        """The sums over all processes; all must call it."""
        sums = self.losses.summed(self.trainer.accelerator)
        return {"args": {}, "attributes": {"sums": sums.tolist()}}

    def load_state(self, attributes: Mapping[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        if world().is_main:
            self.losses.sums = torch.tensor(attributes["sums"], dtype=torch.float64)


def first_batch(
    rows: Sequence[int],
    inputs: Mapping[str, Any],
    images: Mapping[int, int],
    placeholder_ids: Collection[int],
) -> dict[str, float]:
    """What the first batch shows of a run: images, image tokens and the share of supervised tokens. Training
    without images by mistake, or with a mask that covers nothing, is seen here before anything is spent.

    Args:
        images: number of images, frames of videos among them, by row number.

    Raises:
        DataError: no token of the batch is supervised.
    """
    tokens, supervised = int(inputs["attention_mask"].sum()), int((inputs["labels"] != -100).sum())
    if not supervised:
        named = ", ".join(map(str, rows))
        raise DataError(f"no token of the rows {named} is supervised", "rows need answers; see data preview")
    ids = inputs["input_ids"]
    placeholders = torch.tensor(sorted(placeholder_ids), device=ids.device, dtype=ids.dtype)
    return {
        "rows": len(rows),
        "images": sum(images[row] for row in rows),
        "tokens": tokens,
        "image_tokens": int(torch.isin(ids, placeholders).sum()),
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / tokens, 4),
    }


def first_batch_line(found: Mapping[str, float]) -> str:
    """`first_batch` in one line."""
    return (
        f"first batch: {found['rows']} rows, {found['images']} images, {found['tokens']} tokens, of them "
        f"{found['image_tokens']} image tokens and {found['supervised_tokens']} supervised "
        f"({found['supervised_share']:.1%})"
    )
