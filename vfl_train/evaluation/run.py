"""`vfl-train eval`: accuracy per function of a model, or of an adapter beside its base."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vfl_train.errors import ConfigError, VerificationError
from vfl_train.evaluation.drop import DropFrom, show_drops
from vfl_train.evaluation.layers import TouchedLayers, show_touched
from vfl_train.evaluation.questions import Question, builtin_questions, load_questions, probe_questions
from vfl_train.functions.matching import matches
from vfl_train.interventions import Prompt
from vfl_train.knockout.record import knockout_file
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.models.generation import Generated, generate
from vfl_train.options import format_layers, parse_weights
from vfl_train.profiling.cost import reference_line
from vfl_train.progress import track
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import FunctionScore, read_json, wilson

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig

__all__ = ["Question", "evaluate", "probe_questions", "score"]

# Prompts encoded at a time, and their tokens together: bounds the pixels held in memory (about 20 kB for
# each image token of a Qwen2.5-VL, so 0.6 GB).
CHUNK, CHUNK_TOKENS = 64, 32768


def evaluate(config: EvalConfig) -> dict[str, FunctionScore]:
    """Score the model of `config` and write scorecard.json. Prints the table.

    Raises VerificationError (exit 4) if a function lost more than --fail-if-drop allows, after writing and
    also where the scorecard is there already; ConfigError and DataError before anything is written.
    """
    config = replace(config, drop_from=tuple(sorted(set(config.drop_from), reverse=True)))
    allowed = parse_weights(config.fail_if_drop, "--fail-if-drop") if config.fail_if_drop else {}
    given = load_questions(config)  # before the model: a wrong path should not cost its loading
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, config.device, config.load_in_4bit,
        config.max_pixels, config.adapter,
    )  # fmt: skip
    questions, digest = given or builtin_questions(config, vlm)
    unknown = sorted(set(allowed) - {q.function for q in questions})
    if unknown:
        raise ConfigError(f"--fail-if-drop names {unknown[0]!r}, which is not measured here")
    drops = DropFrom(config.drop_from, config.path, config.batch_tokens)
    drops.check(vlm.num_layers)
    touched = TouchedLayers.of(config, vlm.info, [q.function for q in questions], digest)
    if config.dry_run:
        estimate(vlm, questions, config, drops, touched)
        return {}
    inputs = {"questions": digest, "model": model_digest(vlm)}
    if config.adapter is not None:  # its weights are in the model's digest, its scale is not
        inputs["adapter"] = file_sha256(Path(config.adapter) / "adapter_config.json")
    if config.knockout is not None:
        inputs["knockout"] = file_sha256(knockout_file(config.knockout))
    if config.profile is not None:  # which layers run again is what counts of it
        inputs["profile"] = format_layers(touched.twice)
    with RunFolder.open(
        config.output, fingerprint("eval", config, inputs, ("torch", "transformers")), config.overwrite
    ) as run:
        if run.already_done:
            print(f"already done: {run.folder}")
            card = read_json(run.folder / "scorecard.json")
        else:
            card = run_questions(vlm, questions, config, drops, touched)
            run.write_json("scorecard.json", card)
    scores = {name: FunctionScore(**s) for name, s in card["functions"].items()}
    show(scores)
    if "drop_from" in card:
        show_drops(scores, card["drop_from"], vlm.num_layers)
    show_touched(scores)
    if "touched_layers" in card and (line := reference_line(card["touched_layers"])):
        print(line)
    check_gate(scores, allowed)
    return scores


def run_questions(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    config: EvalConfig,
    drops: DropFrom,
    touched: TouchedLayers,
) -> dict[str, Any]:
    """The content of scorecard.json."""
    scores = score(
        vlm, questions, config.max_new_tokens, config.adapter is not None, config.batch_size, drops, touched
    )
    card: dict[str, Any] = {
        "model": config.model, "adapter": config.adapter and Path(config.adapter).name,
        "functions": {name: s.to_json() for name, s in scores.items()},
    }  # fmt: skip
    if drops.layers:
        card["drop_from"] = drops.record()
    if touched:
        card["touched_layers"] = touched.record()
    return card


def check_gate(scores: dict[str, FunctionScore], allowed: dict[str, float]) -> None:
    """Raises VerificationError naming each function that lost more points than `allowed`."""
    lost = [
        f"{name} lost {-s.delta:.1f} points (allowed {allowed[name]:g})"
        for name, s in scores.items()
        if name in allowed and s.delta is not None and -s.delta > allowed[name]
    ]
    if lost:
        raise VerificationError("; ".join(lost))


@dataclass(frozen=True)
class Judged:
    """One question's answers: right as the model is; by its base, if asked; with the image dropped from each
    layer on, if asked and there is an image; and with layers left out or run twice, if asked."""

    right: bool
    base: bool | None
    dropped: dict[int, bool] | None
    touched: dict[str, bool]


def score(
    vlm: VisionLanguageModel,
    questions: Iterable[Question],
    max_new_tokens: int,
    with_base: bool,
    batch_size: int | None = None,
    drops: DropFrom | None = None,
    touched: TouchedLayers | None = None,
) -> dict[str, FunctionScore]:
    """Greedy answers judged per function, `batch_size` prompts at once; `with_base`: also with the adapter
    switched off, on the same prompts; `drops`: also without the image from some layers on, `touched`:
    also with layers left out or run twice (both the adapted model)."""
    questions = list(questions)
    drops = DropFrom(()) if drops is None else drops
    touched = TouchedLayers() if touched is None else touched
    judged = _judged(vlm, questions, max_new_tokens, with_base, batch_size, drops, touched)
    results = list(track(judged, len(questions), "answering"))
    scores = {}
    for name in dict.fromkeys(q.function for q in questions):
        mine = [r for r, q in zip(results, questions, strict=True) if q.function == name]
        right = sum(r.right for r in mine)
        base = sum(bool(r.base) for r in mine) / len(mine) if with_base else None
        accuracy = right / len(mine)
        scores[name] = FunctionScore(
            accuracy, len(mine), wilson(right, len(mine)), base,
            None if base is None else 100 * (accuracy - base),
            drops.scores([r.right for r in mine], [r.dropped for r in mine]) if drops.layers else None,
            **touched.scores(name, [r.right for r in mine], [r.touched for r in mine]),
        )  # fmt: skip
    return scores


def _judged(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    max_new_tokens: int,
    with_base: bool,
    batch_size: int | None,
    drops: DropFrom,
    touched: TouchedLayers,
) -> Iterator[Judged]:
    """One result a question, in order."""

    def answers(prompts: list[Prompt]) -> list[Generated]:
        return generate(vlm, prompts, max_new_tokens, drops.batch_tokens, batch_size)

    def right(outputs: list[Generated], chunk: list[tuple[Question, Prompt]]) -> list[bool]:
        return [matches(o.text, q.answer, q.match) for o, (q, _) in zip(outputs, chunk, strict=True)]

    for chunk in _chunks(vlm, questions):
        prompts = [prompt for _, prompt in chunk]
        outputs = answers(prompts)
        before: Sequence[bool | None] = [None] * len(chunk)
        if with_base:
            with vlm.model.disable_adapter():
                before = right(answers(prompts), chunk)
        dropped = drops.right(vlm, chunk, outputs, max_new_tokens)
        others = touched.right(vlm, chunk, outputs, max_new_tokens)
        yield from map(Judged, right(outputs, chunk), before, dropped, others)


def _chunks(
    vlm: VisionLanguageModel, questions: Iterable[Question]
) -> Iterator[list[tuple[Question, Prompt]]]:
    """Questions with their encoded prompts, as many at a time as CHUNK and CHUNK_TOKENS allow."""
    chunk: list[tuple[Question, Prompt]] = []
    tokens = 0
    for question in questions:
        prompt = vlm.prompt_of(question.messages, question.opened())
        if chunk and (len(chunk) == CHUNK or tokens + prompt.length > CHUNK_TOKENS):
            yield chunk
            chunk, tokens = [], 0
        chunk.append((question, prompt))
        tokens += prompt.length
    if chunk:
        yield chunk


def estimate(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    config: EvalConfig,
    drops: DropFrom,
    touched: TouchedLayers,
) -> None:
    """--dry-run: say how much there is to answer, and how long the first question takes by itself."""
    counts = Counter(q.function for q in questions)
    pictured = sum(bool(q.images) for q in questions)
    passes = {
        "as the model is": len(questions),
        "by its base": len(questions) if config.adapter is not None else 0,
        "with the image dropped": pictured * len(drops.layers),
        "with layers left out or run twice": sum(n * len(touched.branches(f)) for f, n in counts.items()),
    }
    print(f"{len(questions)} questions: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    print(f"{sum(passes.values())} answers: {', '.join(f'{n} {how}' for how, n in passes.items() if n)}")
    first = next((q for q in questions if q.images), questions[0])
    print(f"the first prompt has {vlm.prompt_of(first.messages, first.opened()).length} tokens")
    seconds = 0.0
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        score(vlm, [first], config.max_new_tokens, config.adapter is not None, 1, drops, touched)
        seconds = time.perf_counter() - start
    print(f"about {seconds * len(questions) / 60:.1f} min one by one; in batches it is faster")


def show(scores: dict[str, FunctionScore]) -> None:
    """Print the scorecard."""
    table = Table("function", "n", "accuracy", "95 % interval", "base", "change, points")
    for name, s in scores.items():
        table.add_row(
            name, str(s.n), f"{s.accuracy:.1%}", f"{s.ci95[0]:.1%} - {s.ci95[1]:.1%}",
            "-" if s.base_accuracy is None else f"{s.base_accuracy:.1%}",
            "-" if s.delta is None else f"{s.delta:+.1f}",
        )  # fmt: skip
    Console().print(table)
