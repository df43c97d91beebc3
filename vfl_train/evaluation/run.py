"""`vfl-train eval`: accuracy per function of a model, or of an adapter beside its base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.table import Table

from vfl_train.data.images import open_image
from vfl_train.data.readers import read_dataset
from vfl_train.data.rows import ImageRef, Message, Row, user_message
from vfl_train.errors import ConfigError, DataError, VerificationError
from vfl_train.functions.matching import matches
from vfl_train.functions.probes import ProbeSet, builtin_probe_set, load_probe_set
from vfl_train.interventions import Prompt
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.models.generation import generate
from vfl_train.options import parse_weights
from vfl_train.progress import track
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import FunctionScore, read_json, wilson

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig

CHUNK = 64  # prompts encoded at a time: bounds the pixels held in memory


@dataclass(frozen=True)
class Question:
    """One thing to ask: the turns before the answer, their images (opened when they are needed), the
    expected answer and how to judge it."""

    function: str
    messages: tuple[Message, ...]
    images: tuple[Image.Image | ImageRef, ...]
    answer: str
    match: str = "exact"

    def opened(self) -> list[Image.Image]:
        """The images as RGB pictures."""
        return [open_image(i) if isinstance(i, ImageRef) else i for i in self.images]


def evaluate(config: EvalConfig) -> dict[str, FunctionScore]:
    """Score the model of `config` and write scorecard.json. Prints the table.

    Raises VerificationError (exit 4) if a function lost more than --fail-if-drop allows, after writing and
    also where the scorecard is there already; ConfigError and DataError before anything is written.
    """
    if config.drop_from or config.rerun:
        raise ConfigError("eval --drop-from and --rerun are not there yet", "leave them out")
    allowed = parse_weights(config.fail_if_drop, "--fail-if-drop") if config.fail_if_drop else {}
    questions, digest = load_questions(config)
    unknown = sorted(set(allowed) - {q.function for q in questions})
    if unknown:
        raise ConfigError(f"--fail-if-drop names {unknown[0]!r}, which is not measured here")
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, config.device, config.load_in_4bit,
        config.max_pixels, config.adapter,
    )  # fmt: skip
    inputs = {"questions": digest, "model": model_digest(vlm)}
    if config.adapter is not None:  # its weights are in the model's digest, its scale is not
        inputs["adapter"] = file_sha256(Path(config.adapter) / "adapter_config.json")
    with RunFolder.open(
        config.output, fingerprint("eval", config, inputs, ("torch", "transformers")), config.overwrite
    ) as run:
        if run.already_done:
            print(f"already done: {run.folder}")
            card = read_json(run.folder / "scorecard.json")
            scores = {name: FunctionScore(**s) for name, s in card["functions"].items()}
        else:
            scores = score(
                vlm, questions, config.max_new_tokens, config.adapter is not None, config.batch_size
            )
            card = {
                "model": config.model, "adapter": config.adapter and Path(config.adapter).name,
                "functions": {name: s.to_json() for name, s in scores.items()},
            }  # fmt: skip
            run.write_json("scorecard.json", card)
    show(scores)
    check_gate(scores, allowed)
    return scores


def check_gate(scores: dict[str, FunctionScore], allowed: dict[str, float]) -> None:
    """Raises VerificationError naming each function that lost more points than `allowed`."""
    lost = [
        f"{name} lost {-s.delta:.1f} points (allowed {allowed[name]:g})"
        for name, s in scores.items()
        if name in allowed and s.delta is not None and -s.delta > allowed[name]
    ]
    if lost:
        raise VerificationError("; ".join(lost))


def load_questions(config: EvalConfig) -> tuple[list[Question], str]:
    """What to ask, and a sha256 of it. Raises ConfigError or DataError."""
    pairs = config.pairs if config.limit is None else min(config.pairs, config.limit)
    if config.data is not None:
        dataset = read_dataset(config.data, config.image_root, limit=config.limit)
        questions = [q for row in dataset.rows for q in _row_questions(row)]
        absent = sorted(set(config.functions) - {q.function for q in questions})
        if absent and questions:
            raise ConfigError(f"no single-turn row of {config.data} has the source {absent[0]!r}")
        if config.functions:
            questions = [q for q in questions if q.function in config.functions]
        if not questions:
            raise DataError(
                f"{config.data} holds no row to score", "rows of one question and one answer are scored"
            )
        return questions, dataset.sha256
    if config.probes is not None:
        probes = load_probe_set(Path(config.probes), config.functions, pairs)
    else:
        probes = builtin_probe_set(config.model, config.functions, pairs, config.seed)
    return list(probe_questions(probes)), probes.sha256


def probe_questions(probes: ProbeSet) -> Iterator[Question]:
    """Both images of every pair."""
    for function, pairs in probes.pairs.items():
        for p in pairs:
            asked = (user_message(p.pair.question),)
            yield Question(function, asked, (p.image_a,), p.pair.answer_a, p.pair.match)
            yield Question(function, asked, (p.image_b,), p.pair.answer_b, p.pair.match)


def _row_questions(row: Row) -> Iterator[Question]:
    """Single-turn rows, grouped by their `source`. Rows of several turns are not scored."""
    if [m.role for m in row.messages if m.role != "system"] == ["user", "assistant"]:
        *before, reply = row.messages
        yield Question(row.source, tuple(before), row.images, reply.text.strip())


def score(
    vlm: VisionLanguageModel,
    questions: Iterable[Question],
    max_new_tokens: int,
    with_base: bool,
    batch_size: int | None = None,
) -> dict[str, FunctionScore]:
    """Greedy answers judged per function, `batch_size` prompts at once; `with_base`: also with the adapter
    switched off, on the same prompts."""
    questions = list(questions)
    after, before = [], []
    for start in track(range(0, len(questions), CHUNK), label="answering"):
        part = questions[start : start + CHUNK]
        prompts = [vlm.prompt_of(q.messages, q.opened()) for q in part]
        after += _right(vlm, part, prompts, max_new_tokens, batch_size)
        if with_base:
            with vlm.model.disable_adapter():
                before += _right(vlm, part, prompts, max_new_tokens, batch_size)
    scores = {}
    for name in dict.fromkeys(q.function for q in questions):
        mine = [i for i, q in enumerate(questions) if q.function == name]
        right = sum(after[i] for i in mine)
        base = sum(before[i] for i in mine) / len(mine) if with_base else None
        accuracy = right / len(mine)
        scores[name] = FunctionScore(
            accuracy, len(mine), wilson(right, len(mine)), base,
            None if base is None else 100 * (accuracy - base),
        )  # fmt: skip
    return scores


def _right(
    vlm: VisionLanguageModel,
    questions: list[Question],
    prompts: list[Prompt],
    max_new_tokens: int,
    batch_size: int | None,
) -> list[bool]:
    outputs = generate(vlm, prompts, max_new_tokens, batch_size=batch_size)
    return [matches(o.text, q.answer, q.match) for q, o in zip(questions, outputs, strict=True)]


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
