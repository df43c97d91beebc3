"""What a run keeps of each finished function, so that a killed run goes on with the next one.

The files lie in the run's folder under partial/ and go before it counts as done; nothing reads them but a
run with the same fingerprint, and there is no profile.json until every function is measured.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vfl_train.errors import ConfigError
from vfl_train.functions.probes import LoadedPair
from vfl_train.interventions.readout import Cost
from vfl_train.models.generation import Generated
from vfl_train.profiling.cost import from_record, record
from vfl_train.profiling.sweep import AnsweredPair
from vfl_train.runs import RunFolder
from vfl_train.schemas import FunctionProfile, read_json

FOLDER = "partial"
log = logging.getLogger(__name__)


@dataclass
class Measured:
    """All that the end of a run needs of one function. `plain`: see `Sweeper`; `seconds` of this function."""

    function: FunctionProfile
    answered: list[AnsweredPair]
    cost: Cost = field(default_factory=Cost)
    plain: int = 0
    seconds: float = 0.0
    drop_curve: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the answered pairs their lines and what the model said."""
        said = [
            {"line": p.loaded.line, "a": asdict(p.said_a), "b": asdict(p.said_b), "grids": p.grids}
            for p in self.answered
        ]
        return {
            "note": "one function of a run that is not finished; profile.json is the result",
            "function": asdict(self.function),
            "answered": said,
            "cost": record(self.cost, self.plain, self.seconds),
            "plain": self.plain,
            "seconds": self.seconds,
            "drop_curve": self.drop_curve,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], pairs: Sequence[LoadedPair]) -> Measured:
        """Raises KeyError or TypeError where `value` is not what `to_json` made of these pairs."""
        by_line = {p.line: p for p in pairs}
        answered = []
        for p in value["answered"]:
            a, b = (Generated(tuple(p[side]["tokens"]), p[side]["text"]) for side in ("a", "b"))
            answered.append(AnsweredPair(by_line[p["line"]], a, b, tuple(map(tuple, p["grids"]))))
        function = FunctionProfile(**{f.name: value["function"][f.name] for f in fields(FunctionProfile)})
        return cls(
            function,
            answered,
            from_record(value["cost"]),
            value["plain"],
            value["seconds"],
            value["drop_curve"],
        )


def save(run: RunFolder, name: str, measured: Measured) -> None:
    """Keep the result of one function."""
    run.write_json(f"{FOLDER}/{name}.json", measured.to_json())


def load(run: RunFolder, name: str, pairs: Sequence[LoadedPair]) -> Measured | None:
    """What an earlier attempt at this run kept of the function, if anything usable."""
    path = run.path(f"{FOLDER}/{name}.json")
    if not run.resumed or not path.is_file():
        return None
    try:
        return Measured.from_json(read_json(path), pairs)
    except (ConfigError, KeyError, TypeError) as e:
        log.warning("%s is damaged (%s): %s is measured again", path, e, name)
        return None


def remove(run: RunFolder) -> None:
    """Nothing partial stays in a finished folder."""
    shutil.rmtree(run.path(FOLDER), ignore_errors=True)
