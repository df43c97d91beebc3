"""Which answers are right under interventions: what `--drop-from`, `--knockout` and `--rerun` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from vfl_train.evaluation.questions import Question
from vfl_train.functions.matching import matches
from vfl_train.interventions import Branch, Prompt, Row
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.readout import Cost
from vfl_train.models.generation import Generated

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

Name = TypeVar("Name")


def right_under(
    vlm: VisionLanguageModel,
    asked: Sequence[tuple[Question, Prompt]],
    outputs: Sequence[Generated],
    branches: Sequence[Mapping[Name, Branch]],
    max_new_tokens: int,
    path: str,
    batch_tokens: int,
    cost: Cost,
) -> list[dict[Name, bool]]:
    """Of each question, branch -> whether the answer is right under it. The untouched model's `outputs` are
    the drafts: most branches change few of them. All branches of one prompt go side by side, so that the
    engine reads its image once."""
    rows = [
        Row(prompt, output.tokens, branch)
        for (_, prompt), output, own in zip(asked, outputs, branches, strict=True)
        for branch in own.values()
    ]
    said = iter(generate_under(vlm, rows, max_new_tokens, path, batch_tokens, cost))
    return [
        {name: matches(vlm.decode(next(said)), question.answer, question.match) for name in own}
        for (question, _), own in zip(asked, branches, strict=True)
    ]
