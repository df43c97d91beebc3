"""Fixtures of the data tests: processors built on the fly, a good data set, an audit of opened files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from processors import (
    gemma3_processor,
    internvl_processor,
    llava_processor,
    qwen2_processor,
    qwen3_processor,
    qwen_processor,
)

from vfl_train.data.collator import Encoder
from vfl_train.phantom.architecture import build_processor

BUILDERS: dict[str, Callable] = {
    "phantom": build_processor,
    "qwen": qwen_processor,
    "trimmed": lambda: qwen_processor(trim_offsets=True),
    "llava": llava_processor,
    "qwen2": qwen2_processor,
    "qwen3": qwen3_processor,
    "internvl": internvl_processor,
    "gemma3": gemma3_processor,
}


@pytest.fixture(scope="session")
def encoders() -> dict[str, Encoder]:
    """One encoder per family of tokenizers and templates."""
    return {name: Encoder(build()) for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def make_qwen_processor() -> Callable:
    return qwen_processor


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (64, 64), (200, 30, 40))


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """A folder with three good images, one in a subfolder."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.png", "green"), ("sub/c.jpg", "blue")):
        Image.new("RGB", (16, 16), color).save(root / name)
    return root


def llava_row(number: int, image: str | None = "a.png", answer: str = "three") -> dict:
    marker = "<image>\n" if image else ""
    turns = [{"from": "human", "value": f"{marker}how many {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture
def make_row() -> Callable[..., dict]:
    return llava_row


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or lines as bytes) and returns the file."""

    def write(rows: list, name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


class Audit:
    """Python's audit events of the kinds asked for, while recording. Hooks cannot be removed, so there is
    one for the session."""

    def __init__(self) -> None:
        self.kinds: tuple[str, ...] = ()
        self.events: list[tuple[str, tuple]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.kinds and event in self.kinds:
            self.events.append((event, args))

    @contextmanager
    def record(self, *kinds: str) -> Iterator[list[tuple[str, tuple]]]:
        self.events, self.kinds = [], kinds
        try:
            yield self.events
        finally:
            self.kinds = ()


@pytest.fixture(scope="session")
def audit() -> Audit:
    return Audit()
