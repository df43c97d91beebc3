"""What `vfl-train eval` asks: probe pairs, or the single-turn rows of a data file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vfl_train.data.readers import read_dataset
from vfl_train.data.rows import Message, Rejected, Row, user_message
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.builtin.canvas import SIZE
from vfl_train.functions.probes import (
    Picture,
    ProbeSet,
    builtin_probe_set,
    decoded,
    load_probe_set,
    most_pairs,
)

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig, KnockoutConfig
    from vfl_train.models import VisionLanguageModel


@dataclass(frozen=True)
class Question:
    """One thing to ask: the turns before the answer, their images (opened when they are needed), the
    expected answer, how to judge it, and the row of the data file that it is (from 0, with its id and line),
    if it is one. `videos`: the frames of each."""

    function: str
    messages: tuple[Message, ...]
    images: tuple[Picture, ...]
    answer: str
    match: str = "exact"
    row: int | None = None
    id: str = ""
    line: int | None = None
    videos: tuple[tuple[Picture, ...], ...] = ()

    def opened(self) -> tuple[list[Image.Image], list[list[Image.Image]]]:
        """The images and the frames of the videos as RGB pictures. Raises RowError."""
        shown = [decoded(source) for source in (*self.images, *self.videos)]
        return [i for images, _ in shown for i in images], [v for _, videos in shown for v in videos]


@dataclass(frozen=True)
class Asked:
    """What is asked, a sha256 of where it comes from, and the rows of it that cannot be used."""

    questions: list[Question]
    sha256: str
    rejected: list[Rejected] = field(default_factory=list)


def load_questions(config: EvalConfig) -> Asked | None:
    """What --data or --probes asks; None where it is the built-in pairs, for which the model must be known.
    Raises ConfigError or DataError."""
    if config.data is not None:
        asked = file_questions(config.data, config)
        questions = asked.questions
        absent = sorted(set(config.functions) - {q.function for q in questions})
        if absent:
            raise ConfigError(f"no single-turn row of {config.data} has the source {absent[0]!r}")
        if config.functions:
            questions = [q for q in questions if q.function in config.functions]
        return replace(asked, questions=questions)
    if config.probes is None:
        return None
    probes = load_probe_set(Path(config.probes), config.functions, most_pairs(config.pairs, config.limit))
    return Asked(list(probe_questions(probes)), probes.sha256)


def file_questions(data: str, config: EvalConfig | KnockoutConfig) -> Asked:
    """The single-turn rows of a data file. Raises ConfigError, DataError (there is none)."""
    dataset = read_dataset(data, config.image_root, limit=config.limit)
    questions = [q for row in dataset.rows for q in row_questions(row, config.match)]
    if not questions:
        raise DataError(f"{data} holds no row to score", "rows of one question and one answer are scored")
    return Asked(questions, dataset.sha256, list(dataset.rejected))


def builtin_questions(config: EvalConfig, vlm: VisionLanguageModel) -> Asked:
    """What the built-in pairs ask, boxes as the model's family writes them. Raises ConfigError."""
    probes = builtin_probe_set(
        config.functions,
        most_pairs(config.pairs, config.limit),
        config.seed,
        world=vlm.world,
        box=vlm.box_convention(SIZE),
    )
    return Asked(list(probe_questions(probes)), probes.sha256)


def probe_questions(probes: ProbeSet) -> Iterator[Question]:
    """Both images of every pair."""
    for function, pairs in probes.pairs.items():
        for p in pairs:
            for source, answer in ((p.source_a, p.pair.answer_a), (p.source_b, p.pair.answer_b)):
                videos = (source,) if isinstance(source, tuple) else ()
                images = () if isinstance(source, tuple) else (source,)
                asked = user_message(p.pair.question, len(images), videos=len(videos))
                yield Question(function, (asked,), images, answer, p.pair.match, videos=videos)


def row_questions(row: Row, match: str = "exact") -> Iterator[Question]:
    """Single-turn rows, grouped by their `source`. Rows of several turns are not scored."""
    if [m.role for m in row.messages if m.role != "system"] == ["user", "assistant"]:
        *before, reply = row.messages
        answer = reply.text.strip()
        place = (row.row, row.id, row.line)
        yield Question(row.source, tuple(before), row.images, answer, match, *place, row.videos)
