"""Right or wrong, question by question, and what that adds up to per function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfl_train.data.rows import Rejected, RowError
from vfl_train.errors import DataError
from vfl_train.evaluation.drop import DropFrom
from vfl_train.evaluation.layers import TouchedLayers
from vfl_train.evaluation.questions import Question
from vfl_train.functions.matching import matches
from vfl_train.interventions import Prompt
from vfl_train.knockout.choice import paired_gain
from vfl_train.models import VisionLanguageModel
from vfl_train.models.generation import Generated, generate
from vfl_train.progress import track
from vfl_train.schemas import FunctionScore, wilson

# Prompts encoded at a time, and their tokens together: bounds the pixels held in memory (about 20 kB for
# each image token of a Qwen2.5-VL, so 0.6 GB).
CHUNK, CHUNK_TOKENS = 64, 32768


@dataclass(frozen=True)
class Judged:
    """One question's answers: right as the model is; by its base, if asked; with the image dropped from each
    layer on, if asked and there is an image; and with layers left out or run twice, if asked."""

    question: Question
    right: bool
    base: bool | None
    dropped: dict[int, bool] | None
    touched: dict[str, bool]


@dataclass
class Asking:
    """How questions are asked: at most `max_new_tokens` a answer, `batch_size` prompts at once (None: by
    tokens); `with_base`: also with the adapter switched off; `drops`, `touched`: also under interventions.
    `rejected` gets the rows that the processor cannot encode."""

    max_new_tokens: int
    with_base: bool = False
    batch_size: int | None = None
    drops: DropFrom = field(default_factory=lambda: DropFrom(()))
    touched: TouchedLayers = field(default_factory=TouchedLayers)
    rejected: list[Rejected] = field(default_factory=list)


def score(
    vlm: VisionLanguageModel, questions: Iterable[Question], asking: Asking
) -> dict[str, FunctionScore]:
    """Greedy answers of `vlm`, judged per function. Raises DataError where no question can be asked."""
    return scores_of(answers(vlm, list(questions), asking), asking)


def answers(
    vlm: VisionLanguageModel, questions: Sequence[Question], asking: Asking, label: str = "answering"
) -> list[Judged]:
    """One result a question that can be encoded. Raises DataError where none can."""
    results = list(track(judge(vlm, questions, asking), len(questions), label))
    if not results:
        first = asking.rejected[0]
        raise DataError(f"no row can be encoded by this model; row {first.row}: {first.detail}")
    return results


def right_answers(vlm: VisionLanguageModel, questions: Sequence[Question], asking: Asking) -> list[Judged]:
    """What another model, as it is, answers to the same questions."""
    plain = Asking(asking.max_new_tokens, batch_size=asking.batch_size, rejected=asking.rejected)
    return answers(vlm, questions, plain, "answering as the base")


def scores_of(results: Sequence[Judged], asking: Asking) -> dict[str, FunctionScore]:
    """Accuracy per function with its Wilson interval; beside a base the change in points with Newcombe's
    interval for paired answers, and how many answers turned right and wrong."""
    scores = {}
    for name in dict.fromkeys(r.question.function for r in results):
        mine = [r for r in results if r.question.function == name]
        right = [r.right for r in mine]
        before = [r.base for r in mine if r.base is not None]
        fields: dict[str, Any] = _against(before, right) if before else {}
        if asking.drops.layers:
            fields["drop_from"] = asking.drops.scores(right, [r.dropped for r in mine])
        fields |= asking.touched.scores(name, right, [r.touched for r in mine])
        n = len(mine)
        scores[name] = FunctionScore(sum(right) / n, n, wilson(sum(right), n), **fields)
    return scores


def _against(before: Sequence[bool], right: Sequence[bool]) -> dict[str, Any]:
    delta, interval = paired_gain(before, right)
    return {
        "base_accuracy": sum(before) / len(before), "delta": delta, "delta_ci95": interval,
        "gained": sum(b < r for b, r in zip(before, right, strict=True)),
        "lost": sum(b > r for b, r in zip(before, right, strict=True)),
    }  # fmt: skip


def judge(vlm: VisionLanguageModel, questions: Iterable[Question], asking: Asking) -> Iterator[Judged]:
    """One result a question that can be encoded, in order."""

    def generated(prompts: list[Prompt]) -> list[Generated]:
        return generate(vlm, prompts, asking.max_new_tokens, asking.drops.batch_tokens, asking.batch_size)

    def right(outputs: list[Generated], chunk: list[tuple[Question, Prompt]]) -> list[bool]:
        return [matches(o.text, q.answer, q.match) for o, (q, _) in zip(outputs, chunk, strict=True)]

    for chunk in chunks(vlm, questions, asking.rejected):
        prompts = [prompt for _, prompt in chunk]
        outputs = generated(prompts)
        before: Sequence[bool | None] = [None] * len(chunk)
        if asking.with_base:
            with vlm.model.disable_adapter():
                before = right(generated(prompts), chunk)
        dropped = asking.drops.right(vlm, chunk, outputs, asking.max_new_tokens)
        others = asking.touched.right(vlm, chunk, outputs, asking.max_new_tokens)
        yield from map(Judged, (q for q, _ in chunk), right(outputs, chunk), before, dropped, others)


def chunks(
    vlm: VisionLanguageModel, questions: Iterable[Question], rejected: list[Rejected]
) -> Iterator[list[tuple[Question, Prompt]]]:
    """Questions with their encoded prompts, as many at a time as CHUNK and CHUNK_TOKENS allow. Rows of a data
    file that cannot be encoded go to `rejected`; a probe pair that cannot raises DataError."""
    chunk: list[tuple[Question, Prompt]] = []
    tokens = 0
    for question in questions:
        try:
            prompt = vlm.prompt_of(question.messages, *question.opened())
        except RowError as e:
            if question.row is None:
                raise DataError(f"a question of {question.function} cannot be asked: {e.message}") from e
            rejected.append(Rejected(question.row, question.id, e.code, e.detail, question.line))
            continue
        if chunk and (len(chunk) == CHUNK or tokens + prompt.length > CHUNK_TOKENS):
            yield chunk
            chunk, tokens = [], 0
        chunk.append((question, prompt))
        tokens += prompt.length
    if chunk:
        yield chunk
