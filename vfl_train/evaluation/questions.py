"""What `vfl-train eval` asks: probe pairs, or the single-turn rows of a data file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vfl_train.data.images import open_image
from vfl_train.data.readers import read_dataset
from vfl_train.data.rows import ImageRef, Message, Row, user_message
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.builtin.canvas import SIZE
from vfl_train.functions.probes import ProbeSet, builtin_probe_set, load_probe_set

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig
    from vfl_train.models import VisionLanguageModel


@dataclass(frozen=True)
class Question:
    """One thing to ask: the turns before the answer, their images (opened when they are needed), the
    expected answer, how to judge it, and the row of the data file that it is (from 0), if it is one."""

    function: str
    messages: tuple[Message, ...]
    images: tuple[Image.Image | ImageRef, ...]
    answer: str
    match: str = "exact"
    row: int | None = None

    def opened(self) -> list[Image.Image]:
        """The images as RGB pictures."""
        return [open_image(i) if isinstance(i, ImageRef) else i for i in self.images]


def load_questions(config: EvalConfig) -> tuple[list[Question], str] | None:
    """What --data or --probes asks, and a sha256 of it; None where it is the built-in pairs, for which the
    model must be known. Raises ConfigError or DataError."""
    if config.data is not None:
        dataset = read_dataset(config.data, config.image_root, limit=config.limit)
        questions = [q for row in dataset.rows for q in row_questions(row, config.match)]
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
    if config.probes is None:
        return None
    probes = load_probe_set(Path(config.probes), config.functions, _pairs(config))
    return list(probe_questions(probes)), probes.sha256


def builtin_questions(config: EvalConfig, vlm: VisionLanguageModel) -> tuple[list[Question], str]:
    """What the built-in pairs ask, boxes as the model's family writes them, and a sha256 of it.
    Raises ConfigError."""
    probes = builtin_probe_set(
        config.functions, _pairs(config), config.seed, world=vlm.world, box=vlm.box_convention(SIZE)
    )
    return list(probe_questions(probes)), probes.sha256


def _pairs(config: EvalConfig) -> int:
    return config.pairs if config.limit is None else min(config.pairs, config.limit)


def probe_questions(probes: ProbeSet) -> Iterator[Question]:
    """Both images of every pair."""
    for function, pairs in probes.pairs.items():
        for p in pairs:
            asked = (user_message(p.pair.question),)
            yield Question(function, asked, (p.source_a,), p.pair.answer_a, p.pair.match)
            yield Question(function, asked, (p.source_b,), p.pair.answer_b, p.pair.match)


def row_questions(row: Row, match: str = "exact") -> Iterator[Question]:
    """Single-turn rows, grouped by their `source`. Rows of several turns are not scored."""
    if [m.role for m in row.messages if m.role != "system"] == ["user", "assistant"]:
        *before, reply = row.messages
        yield Question(row.source, tuple(before), row.images, reply.text.strip(), match, row.row)
