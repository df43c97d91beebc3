"""What a merge is worth: the merged model beside its base and beside each adapter alone, on the same
questions.

Adapters on different layers add up exactly as weights, but not as behaviour: a later layer reads what an
earlier one changed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vfl_train.config import EvalConfig
from vfl_train.evaluation.questions import Asked, builtin_questions, load_questions
from vfl_train.evaluation.score import Asking, score
from vfl_train.hub.privacy import public_name

if TYPE_CHECKING:
    from vfl_train.config import MergeConfig
    from vfl_train.models import VisionLanguageModel

log = logging.getLogger(__name__)
_LONGEST = 32  # tokens of an answer, as `vfl-train eval`


@dataclass
class MergeScore:
    """Accuracies, one model after the other: {model: {function: (accuracy, n)}}. Without questions, nothing
    is measured."""

    asked: Asked | None
    source: str
    models: dict[str, dict[str, tuple[float, int]]]

    def measure(self, vlm: VisionLanguageModel, name: str) -> None:
        """Score `vlm.model` as it is under `name`. Raises DataError."""
        if self.asked is None:
            return
        asking = Asking(_LONGEST)
        scores = score(vlm, self.asked.questions, asking)
        if asking.rejected:
            first = asking.rejected[0]
            log.warning("%d rows are not scored; row %d: %s", len(asking.rejected), first.row, first.detail)
        self.models[name] = {function: (s.accuracy, s.n) for function, s in scores.items()}

    def record(self, adapters: list[str]) -> dict[str, Any] | None:
        """What merge.json and the card say; None if nothing was measured. `change` is in points, against the
        best of the base and the adapters alone."""
        if self.asked is None:
            return None
        functions = {}
        for name, (merged, n) in self.models["merged"].items():
            alone = {a: self.models[a][name][0] for a in adapters if a in self.models}
            base = self.models["base"][name][0]
            functions[name] = {
                "n": n, "base": base, "alone": alone, "merged": merged,
                "change": 100 * (merged - max([base, *alone.values()])),
            }  # fmt: skip
        return {"questions": self.source, "sha256": self.asked.sha256, "functions": functions}


def questions_of(config: MergeConfig, vlm: VisionLanguageModel, base: str) -> MergeScore:
    """What the merge will be asked: --data, --probes or the built-in pairs. Raises ConfigError, DataError."""
    if not config.pairs:
        return MergeScore(None, "nothing", {})
    asking = EvalConfig(
        model=base, output=Path("."), probes=config.probes, data=config.data, match=config.match,
        image_root=config.image_root, pairs=config.pairs, seed=config.seed,
    )  # fmt: skip
    asked = load_questions(asking) or builtin_questions(asking, vlm)
    given = config.data or config.probes
    return MergeScore(asked, public_name(str(given)) or "" if given else "built-in probes", {})


def show(record: dict[str, Any] | None) -> None:
    """Print the score."""
    if record is None:
        return
    alone = list(next(iter(record["functions"].values()))["alone"])
    table = Table("function", "n", "base", *map(escape, alone), "merged", "change, points")
    for name, s in record["functions"].items():
        cells = [f"{s['alone'][a]:.1%}" for a in alone]
        table.add_row(
            escape(name), str(s["n"]), f"{s['base']:.1%}", *cells, f"{s['merged']:.1%}", f"{s['change']:+.1f}"
        )
    Console().print(table)
