"""What scoring will cost, before it starts: a few rows of the pool, scored and timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vfl_train.data.rows import Row
from vfl_train.data_select.scoring import Scorer
from vfl_train.interventions.readout import Cost

if TYPE_CHECKING:
    from vfl_train.data.pool import Pool

PROBED = 24  # rows, spread over the pool
WORTH_IT = 400  # rows from which on a probe costs little of the run


@dataclass(frozen=True)
class Estimate:
    """Of the scoring of `rows` rows by `processes` processes, from `per_second` rows a second of one."""

    rows: int
    per_second: float
    processes: int
    on_gpu: bool

    @property
    def hours(self) -> float:
        """Wall time."""
        return self.rows / self.per_second / self.processes / 3600

    def line(self) -> str:
        """One line for the user."""
        where = f"{self.processes} processes" if self.processes > 1 else "one process"
        gpu = f" ({self.hours * self.processes:.2g} GPU-hours)" if self.on_gpu else ""
        return (
            f"about {self.per_second:.3g} rows/s a process: {self.rows} rows in {self.hours:.2g} hours "
            f"with {where}{gpu}"
        )


def estimate(pool: Pool, rows: int, scorer: Scorer, processes: int) -> Estimate | None:
    """Scores some rows twice, the first time to warm up. None: none of them can be scored."""
    step = max(1, rows // PROBED)
    outcomes = (pool.row(number) for number in range(0, rows, step))
    probed = [outcome for outcome in outcomes if isinstance(outcome, Row)][:PROBED]
    probe = replace(scorer, rejected=[], cost=Cost())
    if not probe.score(probed[:4]):
        return None
    start = time.perf_counter()
    done = len(probe.score(probed))
    seconds = time.perf_counter() - start
    return Estimate(rows, done / seconds, processes, scorer.vlm.device.type == "cuda") if done else None
