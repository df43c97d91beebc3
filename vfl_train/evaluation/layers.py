"""`eval --knockout FILE` and `--rerun LAYER|FUNCTION`: what a model answers right with a layer left out, or
with layers run twice and, as controls, every other place of as many layers run twice instead.

Knockout: TaLo, arXiv 2602.01167. Layers run twice: function-level scaling of VFL, arXiv 2509.24791; without
controls a gain there shows nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vfl_train.errors import ConfigError
from vfl_train.evaluation.branches import right_under
from vfl_train.evaluation.questions import Question
from vfl_train.hub.load import load_profile
from vfl_train.interventions import Branch, Prompt, knockout, rerun
from vfl_train.interventions.readout import Cost
from vfl_train.knockout.choice import paired_gain
from vfl_train.knockout.record import Knockout
from vfl_train.models.generation import Generated
from vfl_train.options import format_layers, parse_layers
from vfl_train.profiling.cost import path_record
from vfl_train.schemas import FunctionScore, ModelInfo, wilson

if TYPE_CHECKING:
    from vfl_train.config import EvalConfig
    from vfl_train.models import VisionLanguageModel

log = logging.getLogger(__name__)
OUT = "knockout"  # names that branch; the others are named by the layers that run twice


@dataclass
class TouchedLayers:
    """What is also scored: `out`, the layers to leave out by function, and `twice`, the layers to run twice
    (`at` the end or right after itself). `shots`: rows of the data that the layer was chosen on, which show
    nothing of it. `path`, `batch_tokens`, `cost` as for `read_out`."""

    out: Knockout | None = None
    shots: frozenset[int] = frozenset()
    twice: tuple[int, ...] = ()
    at: str = "end"
    depth: int = 0
    path: str = "engine"
    batch_tokens: int = 8192
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def of(cls, config: EvalConfig, model: ModelInfo, functions: Sequence[str], digest: str) -> TouchedLayers:
        """What `config` asks of `model` and these functions, of questions with this sha256. Raises
        ConfigError: a file or profile of another model, a layer or function that is not there, a knockout
        that abstained throughout."""
        out, shots = None, frozenset[int]()
        if config.knockout is not None:
            out = Knockout.load(config.knockout)
            shots = out.shots_of(digest)
            warnings = out.check_model(model)
            warnings += [
                f"{config.knockout}: the gain of layer {out.layer_of(name)} on {name} is not confirmed "
                "on the rows held out"
                for name in dict.fromkeys(functions)
                if out.layer_of(name) is not None and not out.is_confirmed(name)
            ]
            for warning in warnings:
                log.warning("%s", warning)
            if all(out.layer_of(name) is None for name in functions):
                raise ConfigError(
                    f"{config.knockout} leaves out no layer for what is asked here: it abstained"
                )
        twice = () if config.rerun is None else _layers_of(config, model)
        return cls(out, shots, twice, config.rerun_at, model.num_layers, config.path, config.batch_tokens)

    def __bool__(self) -> bool:
        return self.out is not None or bool(self.twice)

    def branches(self, function: str) -> dict[str, Branch]:
        """Every branch to score a question of `function` under."""
        found: dict[str, Branch] = {}
        layer = None if self.out is None else self.out.layer_of(function)
        if self.out is not None and layer is not None:
            found[OUT] = knockout([layer], self.out.module)
        if self.twice:
            for first in range(self.depth - (self.twice[-1] - self.twice[0])):
                moved = [k - self.twice[0] + first for k in self.twice]
                found[format_layers(moved)] = rerun(moved, self.at)
        return found

    def _branches_of(self, question: Question) -> dict[str, Branch]:
        found = self.branches(question.function)
        if question.row in self.shots:
            found.pop(OUT, None)
        return found

    def right(
        self,
        vlm: VisionLanguageModel,
        asked: Sequence[tuple[Question, Prompt]],
        outputs: Sequence[Generated],
        max_new_tokens: int,
    ) -> list[dict[str, bool]]:
        """Branch -> whether the answer is right."""
        branches = [self._branches_of(question) for question, _ in asked]
        return right_under(
            vlm, asked, outputs, branches, max_new_tokens, self.path, self.batch_tokens, self.cost
        )

    def scores(
        self, function: str, untouched: Sequence[bool], touched: Sequence[dict[str, bool]]
    ) -> dict[str, dict[str, Any]]:
        """scorecard.json's `knockout` and `rerun` of one function."""
        found: dict[str, dict[str, Any]] = {}
        names = self.branches(function)
        if self.out is not None and OUT in names:
            pairs = [(u, t[OUT]) for u, t in zip(untouched, touched, strict=True) if OUT in t]
            if not pairs:
                log.warning("%s: the layer was chosen on all of these rows: nothing is compared", function)
            else:
                before, after = zip(*pairs, strict=True)
                found["knockout"] = {
                    "layer": self.out.layer_of(function), "module": self.out.module,
                    "shots_left_out": len(touched) - len(pairs), "untouched": sum(before) / len(before),
                    **_paired(before, after),
                }  # fmt: skip
        if self.twice:
            own = format_layers(self.twice)
            controls = {
                name: sum(t[name] for t in touched) / len(touched) for name in names if name not in (OUT, own)
            }
            found["rerun"] = {
                "layers": list(self.twice), "at": self.at,
                **_paired(untouched, [t[own] for t in touched]), "controls": controls,
            }  # fmt: skip
        return found

    def record(self) -> dict[str, Any]:
        """How it was computed, for scorecard.json."""
        return path_record(self.path, self.cost)


def _layers_of(config: EvalConfig, model: ModelInfo) -> tuple[int, ...]:
    """The layers of --rerun: themselves, or a function's in the profile."""
    assert config.rerun is not None
    if config.rerun[:1].isdigit():
        layers = parse_layers(config.rerun)
    else:
        if config.profile is None:
            raise ConfigError(f"--rerun {config.rerun} needs --profile", "or name layers, like --rerun 22")
        profile = load_profile(config.profile)
        profile.check_model(model)
        layers = tuple(sorted(profile.layers_of(config.rerun)))
    if layers[-1] >= model.num_layers:
        raise ConfigError(f"--rerun {layers[-1]} is outside this model's layers 0-{model.num_layers - 1}")
    return layers


def _paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with its interval, and points gained against untouched with theirs (paired)."""
    right, n = sum(after), len(after)
    gain, interval = paired_gain(before, after)
    return {
        "accuracy": right / n, "n": n, "ci95": wilson(right, n), "delta": gain, "delta_ci95": interval
    }  # fmt: skip


def show_touched(scores: dict[str, FunctionScore]) -> None:
    """Print a table of what was left out, and one of what ran twice beside its controls."""
    out = {name: s.knockout for name, s in scores.items() if s.knockout is not None}
    twice = {name: s.rerun for name, s in scores.items() if s.rerun is not None}
    if out:
        table = Table("function", "n", "untouched", "without", "accuracy", "gain (95 %), points")
        for name, k in out.items():
            what = f"layer {k['layer']} ({k['module']})"
            table.add_row(escape(name), str(k["n"]), f"{k['untouched']:.1%}", what, *_cells(k))
        table.title = "a layer left out"
        Console().print(table)
        if shots := sum(k["shots_left_out"] for k in out.values()):
            print(f"{shots} rows that the layer was chosen on are left out of this comparison")
    if twice:
        table = Table("function", "n", "untouched", "twice", "accuracy", "gain (95 %), points", "controls")
        for name, r in twice.items():
            controls = list(r["controls"].values())
            spread = "-"
            if controls:
                mean = sum(controls) / len(controls)
                spread = f"{min(controls):.1%} to {max(controls):.1%}, mean {mean:.1%}"
            layers = format_layers(r["layers"])
            table.add_row(
                escape(name), str(r["n"]), f"{scores[name].accuracy:.1%}", layers, *_cells(r), spread
            )
        table.title = "layers run twice; controls: as many layers elsewhere"
        Console().print(table)


def _cells(score: dict[str, Any]) -> tuple[str, str]:
    low, high = score["delta_ci95"]
    return f"{score['accuracy']:.1%}", f"{score['delta']:+.1f} ({low:+.1f} to {high:+.1f})"
