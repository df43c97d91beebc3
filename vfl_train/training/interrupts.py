"""SIGTERM and Ctrl-C while training: the running step ends, one checkpoint is committed, then the process
ends as the signal says. A second signal ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun passes on what the terminal has already sent to the whole group: not a second request.
_SAME_SECONDS = 1.0


class Interrupts:
    """Notes signals instead of letting them break into a step. Use it in a `with` statement."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the others cannot have handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()
        if self.number and error is None:
            self.deliver(self.number)  # it came after the last step

    def deliver(self, number: int) -> None:
        """Let signal `number` do what it does outside of training: the command line ends with 143 or 130."""
        self.number = 0
        self._give_back()
        signal.raise_signal(number)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that loads rows and has not come to `shield_worker` yet
        if not self.number:
            self.number, self._at = number, time.monotonic()
            _say("stopping after this step, with a checkpoint; a second signal stops at once")
        elif time.monotonic() - self._at > _SAME_SECONDS or "TORCHELASTIC_RUN_ID" not in os.environ:
            _say("stopped at once")
            os._exit(128 + number)


def shield_worker(init: Callable[[int], object] | None, worker: int) -> None:
    """A DataLoader's `worker_init_fn`, `init` being its own: leave signals to the trainer.

    SLURM and systemd send SIGTERM to all processes of a job. Under torch's handler a worker then dies, and
    its death breaks into the step of the trainer. A second SIGTERM ends it: a trainer waits for it.
    """
    if init is not None:
        init(worker)
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _say(text: str) -> None:
    # Not through logging or print: a signal may arrive while one of these holds its lock.
    if os.environ.get("RANK", "0") == "0":  # once, not once a process
        os.write(2, f"{text}\n".encode())
