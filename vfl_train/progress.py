"""One progress bar for every long loop: how far, how fast, how long still."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


def track(iterable: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield from `iterable` under a bar on stderr with rate and time left; silent when that is no terminal.

    Args:
        total: number of items; None takes len(iterable) where it has one.
        label: what the items are, like "pairs".
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with _bar(label) as bar:
        task = bar.add_task(label, total=total, rate="")
        for done, item in enumerate(iterable, start=1):
            yield item
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, rate=f"{speed:.1f}/s" if speed else "")


def _bar(label: str) -> Progress:
    # Imported here: most runs have no terminal and never need it.
    from rich import progress
    from rich.console import Console

    columns = [progress.TextColumn("{task.description}")] if label else []
    return progress.Progress(
        *columns,
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
