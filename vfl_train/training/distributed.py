"""The processes of one run: who they are, what they tell each other, how they end.

Everything here works in a single process too, where nothing is joined and nothing is asked. Facts about the
run travel through the group's key-value store and not through collectives: a store knows who has answered,
so a process that never comes is named instead of waited for.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vfl_train.errors import DistributedError
from vfl_train.runs import RunFolder
from vfl_train.training.launch import launched

PATIENCE = 1800  # seconds to wait for a process that still reads its rows or loads its model
_TURNS = itertools.count()
_KEPT: list[object] = []  # what must live until the group is left, such as a DeepSpeed engine
_WORDS = ("gloo", "nccl", "process group", "connection closed by peer", "connection reset")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among those of the run. `local_rank` counts within the machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout: int = PATIENCE

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and logs."""
        return self.rank == 0


_ALONE = World()
_world = _ALONE


def world() -> World:
    """The group that `session` joined, or this process alone."""
    return _world


@contextmanager
def session(device: str, timeout: int) -> Iterator[World]:
    """Join the group that the environment names (see `training.launch`), and leave it at the end.

    Args:
        device: of the settings; `cpu` trains over gloo even where there are GPUs.
        timeout: seconds after which a collective that not all processes reach fails.

    Raises:
        DistributedError: the processes did not meet, or one was lost on the way.
    """
    global _world
    if not launched(os.environ):
        yield _ALONE
        return
    if _world is not _ALONE:  # joined by a caller, who leaves it too
        yield _world
        return
    import torch
    import torch.distributed as dist

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if not on_cpu:
        torch.cuda.set_device(local)
    with lost_processes():
        dist.init_process_group("gloo" if on_cpu else "nccl", timeout=_seconds(timeout))
        _world = World(dist.get_rank(), dist.get_world_size(), local, timeout)
        try:
            yield _world
            exchange(None, "the end")  # whoever hosts the store stays until all have read it
        finally:
            _KEPT.clear()
            _world = _ALONE
            _leave()


def _leave() -> None:
    """Without this the threads of a group abort the interpreter at its end (ZeRO-3 does so always)."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # the same group; DeepSpeed forgets it too
        deepspeed.comm.comm.cdb = None
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(device: str) -> str:
    """The device of this process where the settings say `device`: its own GPU of the machine's."""
    here = world()
    import torch

    if here.size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{here.local_rank}"


def keep(thing: object) -> None:
    """Keep `thing` alive until the session ends."""
    _KEPT.append(thing)


def exchange(value: Any, what: str, patience: float | None = None) -> list[Any]:
    """`value` (plain JSON) of every process, in the order of ranks. All must call, in the same order.

    Args:
        what: what is exchanged, for messages.
        patience: seconds to wait for the others [the session's timeout].

    Raises:
        DistributedError: some did not come in time (they are named), or are at another point of the program.
    """
    here, turn = world(), next(_TURNS) if world().size > 1 else 0
    if here.size == 1:
        return [value]
    store = _store()
    keys = [f"vfl-train/{turn}/{rank}" for rank in range(here.size)]
    store.set(keys[here.rank], json.dumps([what, value], default=str))
    until, pause = time.monotonic() + (patience or here.timeout), 0.002
    while not store.check(keys):  # not store.wait: a signal has to get through
        if time.monotonic() > until:
            late = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise DistributedError(
                f"{_ranks(late)} did not come to {what} within {patience or here.timeout:.0f} s",
                "look at what it was doing; --ddp-timeout waits longer",
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    answers = [json.loads(store.get(key)) for key in keys]
    strayed = [rank for rank, (its, _) in enumerate(answers) if its != what]
    if strayed:
        raise DistributedError(
            f"{_ranks(strayed)} came to {answers[strayed[0]][0]}, rank {here.rank} to {what}"
        )
    return [its for _, its in answers]


def agree(facts: Mapping[str, Any], what: str) -> None:
    """Check that `facts` (plain JSON) are the same in every process.

    Raises DistributedError naming the first fact that differs and its value on two ranks."""
    answers = exchange(dict(facts), what, PATIENCE)
    for name in facts:
        for rank, answer in enumerate(answers):
            if answer.get(name) != answers[0].get(name):
                raise DistributedError(
                    f"the processes differ in {name}: rank 0 has {_short(answers[0].get(name))}, "
                    f"rank {rank} has {_short(answer.get(name))}",
                    "give every node the same files and settings",
                )


def note_step(step: int) -> None:
    """Leave word that this process begins optimizer step `step`, for whoever looks for the one that hangs."""
    if world().size > 1:
        _store().set(f"vfl-train/step/{world().rank}", str(step))


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turns the many errors of a collective that lost a process into a DistributedError that names it."""
    import torch

    try:
        yield
    except torch.distributed.DistError as e:
        raise _lost(e) from e
    except RuntimeError as e:
        if any(word in str(e).lower() for word in _WORDS):
            raise _lost(e) from e
        raise


def _lost(error: Exception) -> DistributedError:
    reason = " ".join(str(error).split())[:160]
    return DistributedError(f"{_suspects()} was lost or hangs: {reason}", "see the messages of that process")


def _suspects() -> str:
    """The processes that got least far by the steps they noted, other than this one if there are any."""
    here = world()
    try:
        store = _store()
        keys = [f"vfl-train/step/{rank}" for rank in range(here.size)]
        steps = {r: int(store.get(k)) for r, k in enumerate(keys) if store.check([k])}
    except Exception:  # the store went with its host
        return "another process" if here.is_main else "rank 0, or what it hosts,"
    others = {rank: steps.get(rank, -1) for rank in range(here.size) if rank != here.rank}
    behind = [rank for rank, step in others.items() if step == min(others.values())]
    return _ranks(behind) if behind else "another process"


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _seconds(number: int) -> Any:
    from datetime import timedelta

    return timedelta(seconds=number)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the output folder -----------------------------------------------------------------------------


class RunView(RunFolder):
    """The output folder as the other processes have it: they read, and what they write is dropped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def path(self, name: str) -> Path:
        """Where the file `name` lies; nothing is made."""
        return self.folder / name

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary path whose content goes nowhere."""
        with tempfile.TemporaryDirectory(prefix="vfl-train-") as scratch:
            yield Path(scratch) / Path(name).name


def open_run(
    output: Path, fingerprint: Mapping[str, Any], overwrite: bool, allow_change: Sequence[str] | None = None
) -> RunFolder:
    """`RunFolder.open` in the first process, a `RunView` with what that found in the others. Raises as it."""
    agree({"the base model": fingerprint.get("inputs", {}).get("model")}, "the base model")
    run, state = None, None
    if world().is_main:
        run = RunFolder.open(output, fingerprint, overwrite, allow_change)
        state = "done" if run.already_done else "running" if run.resumed else "new"
    found = exchange(state, "the output folder")[0]
    return run or RunView(Path(output), fingerprint, found)
