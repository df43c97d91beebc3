"""What comparisons on the phantom's shifted domain share: options, accuracy, and the runs kept on disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfl_train.cpu import keep_freed_memory
from vfl_train.evaluation.run import Asking, probe_questions, score
from vfl_train.models import VisionLanguageModel
from vfl_train.phantom.datasets import probe_set
from vfl_train.schemas import read_json


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every comparison has."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--function", default="ocr", choices=("ocr", "count"))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--output", type=Path, required=True)
    return parser


class Comparison:
    """The `runs` of comparison.json in --output: those that stand there, and those to come."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        keep_freed_memory()
        arguments.output.mkdir(parents=True, exist_ok=True)
        self.path = arguments.output / "comparison.json"
        self.said = {"model": arguments.model, "function": arguments.function}
        self.runs: list[dict[str, Any]] = read_json(self.path)["runs"] if self.path.is_file() else []

    def add(self, run: dict[str, Any]) -> None:
        """Keep one more run."""
        self.runs.append(run)
        text = json.dumps({**self.said, "runs": self.runs}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


def accuracy(model: str, adapter: Path | None, kinds: Mapping[str, int], seed: int) -> dict[str, float]:
    """Percent right on held-out scenes of each kind (name -> pairs); a seed draws other ones for training."""
    vlm = VisionLanguageModel.load(model, adapter=str(adapter) if adapter else None)
    found = score(vlm, probe_questions(probe_set(dict(kinds), seed + 1)), Asking(max_new_tokens=8))
    return {name: 100 * s.accuracy for name, s in found.items()}
