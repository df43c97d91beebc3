"""What is asked of a model under an intervention, and what comes back; the seam between the users of
interventions (profile, select, eval) and the implementations (`reference`, later `engine`).

A *row* is one prompt, one forced answer and one branch. Implementations take any list of rows and may
share work between them; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    image, equal exactly where two images may be swapped. `answer_start`: None, or for prompts that
    already hold their answers (multi-turn training rows) unused."""

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
    token positions whose prediction is read (None: the answer's)."""

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


@dataclass(frozen=True)
class ReadOut:
    """`logprobs`: log-probability (nats, float32) of each target token; `greedy`: whether each is the
    argmax of the raw logits; `next_token`: the argmax after the row's last token."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    next_token: int

    @property
    def holds(self) -> bool:
        """Whether greedy decoding under this branch gives exactly these targets."""
        return all(self.greedy)

    @property
    def loss(self) -> float:
        """Mean negative log-probability, nats per target token."""
        return -sum(self.logprobs) / max(1, len(self.logprobs))


def read_out(
    vlm: VisionLanguageModel, rows: Sequence[Row], path: str = "reference", batch_tokens: int = 8192
) -> Iterator[ReadOut]:
    """Read-outs of `rows`, in order. `path`: which implementation; `batch_tokens`: padded tokens a batch
    may hold (memory). Raises ConfigError for a path that does not exist or layers outside the model."""
    if path != "reference":
        raise ConfigError(f"the {path} path is not there yet", "use --path reference")
    from vfl_train.interventions.reference import read_out_reference

    return read_out_reference(vlm, rows, batch_tokens)
