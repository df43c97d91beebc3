"""The function scorecard of `vfl-train eval` on a model card: a table, and the Hub's model-index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError
from vfl_train.hub.privacy import public_name
from vfl_train.runs import MANIFEST, file_sha256
from vfl_train.schemas import FunctionScore, check_function_name, read_json

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig

SCORECARD = "scorecard.json"


def measured(config: EvalConfig, questions_sha256: str) -> dict[str, Any]:
    """What a scorecard says of what was measured, so that it cannot be put on the card of other weights:
    which questions, and the manifest of the folder that vfl-train wrote the weights to (null if another
    program did)."""
    manifest = Path(config.adapter or config.model) / MANIFEST
    questions = config.data or (str(config.probes) if config.probes else None)
    return {
        "questions": {
            "name": public_name(questions) if questions else "built-in probes",
            "sha256": questions_sha256,
        },
        "manifest_sha256": file_sha256(manifest) if manifest.is_file() else None,
    }


@dataclass(frozen=True)
class Scorecard:
    """A checked scorecard.json. `questions` names what was asked, `sha256` is of the file."""

    functions: dict[str, FunctionScore]
    questions: str
    questions_sha256: str
    sha256: str

    @classmethod
    def load(cls, path: Path, folder: Path) -> Scorecard:
        """Read `path` (scorecard.json or the folder with it). It must be of the weights in `folder`.

        Raises:
            ConfigError: no scorecard, or one of other weights.
        """
        path = path / SCORECARD if path.is_dir() else path
        value = read_json(path)
        try:
            functions = {
                check_function_name(name): FunctionScore(**score)
                for name, score in value["functions"].items()
            }
            questions, digest = str(value["questions"]["name"]), str(value["questions"]["sha256"])
            of = value["manifest_sha256"]
            numbers = [x for f in functions.values() for x in (f.accuracy, *f.ci95, f.n)]
            if not functions or not all(isinstance(x, int | float) for x in numbers):
                raise TypeError("a function has no accuracy")
        except (KeyError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"{path} is not a scorecard of this version: {e}", "run vfl-train eval again"
            ) from None
        if of != file_sha256(folder / MANIFEST):
            raise ConfigError(
                f"{path} is of other weights than those in {folder}",
                f"vfl-train eval on {folder} makes one of these",
            )
        return cls(functions, questions, digest, file_sha256(path))


def results_section(card: Scorecard) -> str:
    """The before/after table in Markdown; without a base, accuracy alone."""
    beside = all(f.base_accuracy is not None for f in card.functions.values())
    head = ["function", "questions", *(["base"] if beside else []), "this model"]
    head += ["change, points"] if beside else []
    rows = [_row(name, f, beside) for name, f in card.functions.items()]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    asked = f"{card.questions} (sha256 {card.questions_sha256[:12]})"
    both = "; the base was asked the same questions" if beside else ""
    return f"""Accuracy by function on {asked}, answers generated greedily, with 95 % intervals{both}.

{table}
"""


def _row(name: str, f: FunctionScore, beside: bool) -> list[str]:
    own = f"{f.accuracy:.1%} ({f.ci95[0]:.1%} to {f.ci95[1]:.1%})"
    if not beside:
        return [name, str(f.n), own]
    change = f"{f.delta or 0.0:+.1f}"
    if f.delta_ci95:
        change += f" ({f.delta_ci95[0]:+.1f} to {f.delta_ci95[1]:+.1f})"
    return [name, str(f.n), f"{f.base_accuracy:.1%}", own, change]


def model_index(card: Scorecard, name: str) -> list[dict[str, Any]]:
    """The `model-index` of a card's metadata: one result a function."""
    return [
        {
            "name": name,
            "results": [
                {
                    "task": {"type": "image-text-to-text", "name": f"vision function: {function}"},
                    "dataset": {
                        "name": f"{card.questions}: {function}",
                        "type": "vfl-train-probes" if card.questions == "built-in probes" else "custom",
                        "config": function,
                        "split": "test",
                    },
                    # The base's accuracy stands in the table only: readers of this take it for the model's.
                    "metrics": [{"type": "accuracy", "name": "accuracy", "value": round(score.accuracy, 6)}],
                }
                for function, score in card.functions.items()
            ],
        }
    ]
