"""What each branch makes of labelled samples: right or wrong, and the log-probability of the label.

The label is forced under every branch in one sweep. Where greedy decoding would say just the label, it is
right; elsewhere the answer is generated, from where it left the label, and judged as `eval` does, unless its
beginning settles it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vfl_train.data.rows import assistant_message
from vfl_train.errors import DataError, NumericError
from vfl_train.evaluation.questions import Question
from vfl_train.functions.matching import matches
from vfl_train.interventions import BASE, Branch, Prompt, ReadOut, Row, read_out
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.readout import Cost
from vfl_train.profiling.outcomes import settled
from vfl_train.progress import track

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

CHUNK = 16  # samples encoded at a time


@dataclass(frozen=True)
class Vectors:
    """Of n samples under base and B branches: `right` bool [n, 1 + B], `logprob` [n, 1 + B] of the label,
    nats an answer token, its end token included."""

    right: np.ndarray
    logprob: np.ndarray


@dataclass
class Meter:
    """Measures samples. `cost` adds up what that took; `plain` is the token-layers (but the last) of one
    plain forward of each of the `samples`."""

    vlm: VisionLanguageModel
    max_new_tokens: int = 32
    path: str = "engine"
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        self.cost = Cost()
        self.plain = self.samples = 0

    @property
    def forward(self) -> float:
        """Token-layers of a plain forward of one sample, on average: the unit of `plain_forwards`."""
        return self.plain / max(1, self.samples)

    def measure(self, questions: Sequence[Question], branches: Sequence[Sequence[Branch]]) -> list[Vectors]:
        """The vectors of each question under base and its own branches: one a question, n = 1."""
        found: list[Vectors] = []
        for start in track(range(0, len(questions), CHUNK), label="measuring"):
            chunk = slice(start, start + CHUNK)
            found += self._chunk(questions[chunk], branches[chunk])
        return found

    def _chunk(self, questions: Sequence[Question], branches: Sequence[Sequence[Branch]]) -> list[Vectors]:
        rows, owner = [], []
        for i, (question, own) in enumerate(zip(questions, branches, strict=True)):
            prompt, answer = forced(self.vlm, question)
            self.samples += 1
            self.plain += (prompt.length + len(answer)) * (self.vlm.num_layers - 1)
            rows += [Row(prompt, answer, branch) for branch in (BASE, *own)]
            owner += [i] * (1 + len(own))
        read = list(read_out(self.vlm, rows, self.path, self.batch_tokens, self.cost))
        right = self._right(rows, read, [questions[i] for i in owner])
        found = []
        for i, question in enumerate(questions):
            mine = [k for k, j in enumerate(owner) if j == i]
            losses = [read[k].loss for k in mine]
            if not all(map(math.isfinite, losses)):
                raise NumericError(f"a loss on {question.function} is not finite", "try --dtype float32")
            found.append(Vectors(np.array([[right[k] for k in mine]]), -np.array([losses])))
        return found

    def _right(self, rows: list[Row], read: list[ReadOut], questions: list[Question]) -> list[bool]:
        """Whether each row's own greedy answer is right."""
        begun = [
            None if found.holds else _left_at(row.answer, found)
            for row, found in zip(rows, read, strict=True)
        ]
        known = [
            True if tokens is None else self._settled(tokens, question)
            for tokens, question in zip(begun, questions, strict=True)
        ]
        open_rows = [k for k, right in enumerate(known) if right is None]
        said = generate_under(
            self.vlm, [rows[k] for k in open_rows], self.max_new_tokens, self.path, self.batch_tokens,
            self.cost, [[begun[k] or (), rows[k].answer] for k in open_rows],
        )  # fmt: skip
        for k, tokens in zip(open_rows, said, strict=True):
            known[k] = matches(self.vlm.decode(tokens), questions[k].answer, questions[k].match)
        return [bool(right) for right in known]

    def _settled(self, begun: tuple[int, ...], question: Question) -> bool | None:
        """Whether an answer that begins so is right, where that is certain without generating the rest."""
        text = self.vlm.decode(begun)
        if begun[-1] in self.vlm.eos_token_ids:
            return matches(text, question.answer, question.match)
        return settled(text, question.answer, question.match)


def _left_at(answer: Sequence[int], found: ReadOut) -> tuple[int, ...]:
    """The label up to where the model leaves it, and what it says there instead."""
    at = found.greedy.index(False)
    return (*answer[:at], found.predicted[at])


def forced(vlm: VisionLanguageModel, question: Question) -> tuple[Prompt, tuple[int, ...]]:
    """The prompt of a question and its label as tokens, the end token included. Raises DataError where the
    chat template begins an answer otherwise than it ends a prompt."""
    pictures = question.opened()
    prompt = vlm.prompt_of(question.messages, *pictures)
    whole = vlm.encoder.encode([*question.messages, assistant_message(question.answer)], *pictures)
    ids = whole.inputs["input_ids"][0]
    answer = ids[whole.answer_mask].tolist()
    full = torch.cat([prompt.inputs["input_ids"][0], torch.tensor(answer, dtype=ids.dtype)])
    if not answer or not torch.equal(full, ids[: len(full)]):
        raise DataError(f"the answer {question.answer!r} cannot be forced: the chat template moves it")
    return prompt, tuple(answer)


def together(vectors: Sequence[Vectors]) -> Vectors:
    """Vectors of several samples under equally many branches as one."""
    return Vectors(np.concatenate([v.right for v in vectors]), np.concatenate([v.logprob for v in vectors]))
