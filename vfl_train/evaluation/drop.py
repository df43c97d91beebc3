"""`eval --drop-from`: what a model still answers right when no text may read the image from a layer on.

The papers' Table 1 (VFL, arXiv 2509.24791: "drop the last N layers"), on labelled data and by our
definition of a drop (`interventions.intervention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vfl_train.errors import ConfigError
from vfl_train.evaluation.branches import right_under
from vfl_train.evaluation.questions import Question
from vfl_train.interventions import Prompt, drop
from vfl_train.interventions.readout import Cost
from vfl_train.models.generation import Generated
from vfl_train.profiling.cost import path_record, reference_line
from vfl_train.schemas import FunctionScore, wilson

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel


@dataclass
class DropFrom:
    """The image dropped from each of `layers` (0-based, most layers left first) to the last one. `path` and
    `batch_tokens` as for `read_out`; `cost` adds up what the drops took."""

    layers: tuple[int, ...]
    path: str = "engine"
    batch_tokens: int = 8192
    cost: Cost = field(default_factory=Cost)

    def check(self, num_layers: int) -> None:
        """Raises ConfigError naming a layer that the model does not have."""
        for layer in self.layers:
            if not 0 <= layer < num_layers:
                raise ConfigError(
                    f"--drop-from {layer} is outside this model's layers 0-{num_layers - 1}",
                    f"to drop the last N of its {num_layers} layers, give {num_layers} minus N",
                )

    def right(
        self,
        vlm: VisionLanguageModel,
        asked: Sequence[tuple[Question, Prompt]],
        outputs: Sequence[Generated],
        max_new_tokens: int,
    ) -> list[dict[int, bool] | None]:
        """Layer -> whether the answer is right with the image dropped from it on; None for a question
        without an image."""
        seen = {layer: drop(range(layer, vlm.num_layers)) for layer in self.layers}
        branches = [seen if prompt.spans else {} for _, prompt in asked]
        found = right_under(
            vlm, asked, outputs, branches, max_new_tokens, self.path, self.batch_tokens, self.cost
        )
        return [right if prompt.spans else None for right, (_, prompt) in zip(found, asked, strict=True)]

    def scores(
        self, untouched: Sequence[bool], dropped: Sequence[dict[int, bool] | None]
    ) -> dict[str, Any] | None:
        """scorecard.json's `drop_from` of one function, over its questions with an image: accuracy, n, ci95
        and the change in points against the untouched model on the same questions. None without any."""
        pairs = [(u, d) for u, d in zip(untouched, dropped, strict=True) if d is not None]
        if not pairs:
            return None
        n, base, out = len(pairs), sum(u for u, _ in pairs), {}
        for layer in self.layers:
            right = sum(d[layer] for _, d in pairs)
            out[str(layer)] = {
                "accuracy": right / n, "n": n, "ci95": wilson(right, n), "delta": 100 * (right - base) / n
            }  # fmt: skip
        return out

    def record(self) -> dict[str, Any]:
        """How it was computed, for scorecard.json."""
        return {"layers": list(self.layers), **path_record(self.path, self.cost)}


def show_drops(scores: dict[str, FunctionScore], record: dict[str, Any], num_layers: int) -> None:
    """Print the papers' table: a row a function, a column a drop; and which path computed it."""
    layers = [str(layer) for layer in record["layers"]]
    table = Table("function", "n", "untouched", *(f"from {k}" for k in layers))
    for name, s in scores.items():
        if s.drop_from is None:
            table.add_row(name, "0", *["no image"] * (1 + len(layers)))
            continue
        cells = [s.drop_from[k] for k in layers]
        untouched = cells[0]["accuracy"] - cells[0]["delta"] / 100
        changes = [f"{c['accuracy']:.1%} ({c['delta']:+.1f})" for c in cells]
        table.add_row(name, str(cells[0]["n"]), f"{untouched:.1%}", *changes)
    table.title = f"image dropped from a layer to the last ({num_layers - 1})"
    table.caption = f"accuracy (points against untouched); path {record['path']}"
    if line := reference_line(record):
        table.caption += f"; {line}"
    Console().print(table)
