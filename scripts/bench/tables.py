"""Markdown tables as the scripts print them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in rows)]


def mean_and_each(values: Sequence[float]) -> str:
    """`2.0 (1.0, 3.0)`; a dash for none."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"
