"""`vfl-train eval`: accuracy per function of a model, or of an adapter beside its base."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vfl_train.data.readers import write_quarantine
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.evaluation.drop import DropFrom, show_drops
from vfl_train.evaluation.layers import TouchedLayers, show_touched
from vfl_train.evaluation.questions import Asked, Question, builtin_questions, load_questions, probe_questions
from vfl_train.evaluation.score import Asking, answers, right_answers, score, scores_of
from vfl_train.hub.scorecard_card import measured
from vfl_train.knockout.record import knockout_file
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.options import format_layers, parse_weights
from vfl_train.profiling.cost import reference_line
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import FunctionScore, read_json

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig

__all__ = ["Asking", "Question", "evaluate", "probe_questions", "score"]


def evaluate(config: EvalConfig) -> dict[str, FunctionScore]:
    """Score the model of `config` and write scorecard.json. Prints the table.

    Raises VerificationError (exit 4) if a function lost more than --fail-if-drop allows, after writing and
    also where the scorecard is there already; ConfigError and DataError before anything is written.
    """
    config = replace(config, drop_from=tuple(sorted(set(config.drop_from), reverse=True)))
    allowed = parse_weights(config.fail_if_drop, "--fail-if-drop") if config.fail_if_drop else {}
    given = load_questions(config)  # before the model: a wrong path should not cost its loading
    inputs = {} if config.base is None else {"base": _base_digest(config)}
    vlm = _load(config, config.model, config.adapter)
    asked = given or builtin_questions(config, vlm)
    unknown = sorted(set(allowed) - {q.function for q in asked.questions})
    if unknown:
        raise ConfigError(f"--fail-if-drop names {unknown[0]!r}, which is not measured here")
    asking = _asking(config, vlm, asked)
    if config.dry_run:
        estimate(vlm, asked.questions, asking, beside=config.base is not None)
        return {}
    inputs |= {"questions": asked.sha256, "model": model_digest(vlm)}
    if config.adapter is not None:  # its weights are in the model's digest, its scale is not
        inputs["adapter"] = file_sha256(Path(config.adapter) / "adapter_config.json")
    if config.knockout is not None:
        inputs["knockout"] = file_sha256(knockout_file(config.knockout))
    if config.profile is not None:  # which layers run again is what counts of it
        inputs["profile"] = format_layers(asking.touched.twice)
    with RunFolder.open(
        config.output, fingerprint("eval", config, inputs, ("torch", "transformers")), config.overwrite
    ) as run:
        if run.already_done:
            print(f"already done: {run.folder}")
            card = read_json(run.folder / "scorecard.json")
        else:
            card = run_questions(vlm, asked, config, asking) | measured(config, asked.sha256)
            if rejected := sorted([*asked.rejected, *asking.rejected], key=lambda entry: entry.row):
                with run.replacing("quarantine.jsonl") as path:
                    write_quarantine(rejected, path)
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


def _load(config: EvalConfig, name: str, adapter: str | None = None) -> VisionLanguageModel:
    revision = config.revision if name == config.model else None
    return VisionLanguageModel.load(
        name, revision, config.dtype, config.device, config.load_in_4bit, config.max_pixels, adapter,
        load_in_8bit=config.load_in_8bit,
    )  # fmt: skip


def _base_digest(config: EvalConfig) -> str:
    """Loads --base and lets it go: two models need not fit beside each other. Raises ConfigError."""
    assert config.base is not None
    return model_digest(_load(config, config.base))


def _asking(config: EvalConfig, vlm: VisionLanguageModel, asked: Asked) -> Asking:
    drops = DropFrom(config.drop_from, config.path, config.batch_tokens)
    drops.check(vlm.num_layers)
    touched = TouchedLayers.of(config, vlm.info, [q.function for q in asked.questions], asked.sha256)
    with_base = config.adapter is not None
    return Asking(config.max_new_tokens, with_base, config.batch_size, drops, touched)


def run_questions(
    vlm: VisionLanguageModel, asked: Asked, config: EvalConfig, asking: Asking
) -> dict[str, Any]:
    """The content of scorecard.json."""
    results = answers(vlm, asked.questions, asking)
    if config.base is not None:
        vlm.model.to("cpu")  # the device need not hold both
        questions = [r.question for r in results]
        others = right_answers(_load(config, config.base), questions, asking)
        before = {id(r.question): r.right for r in others}
        results = [replace(r, base=before[id(r.question)]) for r in results if id(r.question) in before]
    scores = scores_of(results, asking)
    card: dict[str, Any] = {
        "model": config.model, "adapter": config.adapter and Path(config.adapter).name,
        "functions": {name: s.to_json() for name, s in scores.items()},
    }  # fmt: skip
    if config.base is not None:
        card["base"] = config.base
    if asking.drops.layers:
        card["drop_from"] = asking.drops.record()
    if asking.touched:
        card["touched_layers"] = asking.touched.record()
    if quarantined := len(asked.rejected) + len(asking.rejected):
        card["quarantined"] = quarantined
        print(f"{quarantined} rows cannot be used, see quarantine.jsonl")
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


def estimate(
    vlm: VisionLanguageModel, questions: Sequence[Question], asking: Asking, beside: bool = False
) -> None:
    """--dry-run: say how much there is to answer, and how long the first question takes by itself. `beside`:
    another model answers too."""
    counts = Counter(q.function for q in questions)
    pictured = sum(bool(q.images or q.videos) for q in questions)
    touched = asking.touched
    passes = {
        "as the model is": len(questions),
        "by its base": len(questions) if asking.with_base or beside else 0,
        "with the image dropped": pictured * len(asking.drops.layers),
        "with layers left out or run twice": sum(n * len(touched.branches(f)) for f, n in counts.items()),
    }
    print(f"{len(questions)} questions: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    print(f"{sum(passes.values())} answers: {', '.join(f'{n} {how}' for how, n in passes.items() if n)}")
    first = next((q for q in questions if q.images or q.videos), questions[0])
    print(f"the first prompt has {vlm.prompt_of(first.messages, *first.opened()).length} tokens")
    seconds = 0.0
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        score(vlm, [first], replace(asking, batch_size=1))
        seconds = time.perf_counter() - start
    print(f"about {seconds * len(questions) / 60:.1f} min one by one; in batches it is faster")


def show(scores: dict[str, FunctionScore]) -> None:
    """Print the scorecard."""
    table = Table("function", "n", "accuracy (95 %)", "base", "change, points (95 %)", "gained", "lost")
    for name, s in scores.items():
        cells = [f"{s.accuracy:.1%} ({s.ci95[0]:.1%} to {s.ci95[1]:.1%})"]
        if s.delta is None or s.delta_ci95 is None:
            cells += ["-"] * 4
        else:
            low, high = s.delta_ci95
            cells += [f"{s.base_accuracy:.1%}", f"{s.delta:+.1f} ({low:+.1f} to {high:+.1f})"]
            cells += [str(s.gained), str(s.lost)]
        table.add_row(escape(name), str(s.n), *cells)
    if any(s.delta is not None for s in scores.values()):
        table.caption = "gained, lost: questions that only the model, only its base answers right"
    Console().print(table)
