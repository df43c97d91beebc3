"""What is asked of a model under an intervention, and what comes back; the seam between the users of
interventions (profile, select, eval) and the implementations (`reference`, `engine`).

A *row* is one prompt, one forced answer and one branch. Implementations take any list of rows and may
share work between them; the numbers are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from vfl_train.errors import ConfigError
from vfl_train.interventions.intervention import BASE, Branch

if TYPE_CHECKING:
    import torch

    from vfl_train.models import VisionLanguageModel


@dataclass(frozen=True, eq=False)
class Prompt:
    """An encoded prompt. `inputs`: what the processor returned for one sample (batch dimension 1).
    `spans`: token range [start, stop) of each image in `input_ids`; `grids`: one comparable shape an
    image, equal exactly where two images may be swapped."""

    inputs: Mapping[str, torch.Tensor]
    spans: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens in the prompt."""
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True, eq=False)
class Row:
    """`answer` (token ids, may be empty) is forced after `prompt` under `branch`; `targets` are absolute
    token positions whose prediction is read (None: the answer's). A row without targets reads what comes
    after its last token instead."""

    prompt: Prompt
    answer: tuple[int, ...] = ()
    branch: Branch = BASE
    donors: Mapping[str, Prompt] = field(default_factory=dict)
    targets: tuple[int, ...] | None = None

    def positions(self) -> tuple[int, ...]:
        """Positions of the tokens that are read: token t is predicted by position t - 1."""
        if self.targets is not None:
            return self.targets
        return tuple(range(self.prompt.length, self.prompt.length + len(self.answer)))

    def read_positions(self) -> tuple[int, ...]:
        """Positions whose logits are read: those before the targets, or the last one if there are none."""
        return tuple(t - 1 for t in self.positions()) or (self.prompt.length + len(self.answer) - 1,)

    def target_tokens(self) -> list[int]:
        """Token ids of the targets."""
        start = self.prompt.length
        inside = [t for t in self.positions() if t < start]
        ids = self.prompt.inputs["input_ids"][0, inside].tolist() if inside else []
        return ids + [self.answer[t - start] for t in self.positions() if t >= start]


@dataclass(frozen=True)
class ReadOut:
    """What a row said. `logprobs`: log-probability (nats, in float32 at least) of each target token;
    `predicted`: the argmax of the raw logits in its place; `greedy`: whether the two are the same token;
    `next_token`: the argmax after the row's last token, for rows without targets (None for the others)."""

    logprobs: tuple[float, ...]
    predicted: tuple[int, ...]
    greedy: tuple[bool, ...]
    next_token: int | None = None

    @property
    def holds(self) -> bool:
        """Whether greedy decoding under this branch gives exactly these targets."""
        return all(self.greedy)

    @property
    def loss(self) -> float:
        """Mean negative log-probability, nats per target token."""
        return -sum(self.logprobs) / max(1, len(self.logprobs))


@dataclass
class Cost:
    """What read-outs cost, added up. `token_layers`: tokens times decoder layers computed, the last layer
    apart: `last_layer_tokens` counts its queries, `head_tokens` those that went through the language-model
    head. `rows`: rows read; `reference_rows`: those of them that ran on the reference path though the
    engine was asked for, and `reasons` why."""

    rows: int = 0
    reference_rows: int = 0
    token_layers: int = 0
    last_layer_tokens: int = 0
    head_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Cost) -> None:
        """Count `other` in."""
        for item in fields(self):
            total = getattr(self, item.name) + getattr(other, item.name)
            setattr(self, item.name, total)


def read_out(
    vlm: VisionLanguageModel,
    rows: Sequence[Row],
    path: str = "engine",
    batch_tokens: int = 8192,
    cost: Cost | None = None,
) -> Iterator[ReadOut]:
    """Read-outs of `rows`, in order.

    Args:
        path: `reference` (one full forward a row) or `engine` (shared prefix; rows that it cannot run
            exactly go to the reference path, and `cost` says how many and why).
        batch_tokens: padded tokens a batch may hold (memory). A row that is longer runs alone; what masks
            take then is said in `reference`.
        cost: added to while reading.

    Raises ConfigError for an unknown path, layers or images that do not exist, swaps of unequal grids.
    """
    cost = Cost() if cost is None else cost
    if path == "reference":
        from vfl_train.interventions.reference import read_out_reference

        return read_out_reference(vlm, rows, batch_tokens, cost)
    if path == "engine":
        from vfl_train.interventions.engine import read_out_engine

        return read_out_engine(vlm, rows, batch_tokens, cost)
    raise ConfigError(f"there is no path {path!r}", "use engine or reference")
