"""The adapter of the lowest validation loss, on the disk until the run ends.

One file a validation that was better than all before, named by its step, so that whichever checkpoint a run
is resumed from, the best adapter that checkpoint knew of is still there. The folder lies among the
checkpoints: it is work in progress and goes with them.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from pathlib import Path

from vfl_train.runs import disk_errors, flush_to_disk
from vfl_train.training.distributed import exchange, world
from vfl_train.training.state import WEIGHTS, Parameters, load_parameters, parameter_bytes


class BestAdapter:
    """Keeps the trained `parameters` (name, parameter) below `folder`; `keep` is how many checkpoints a run
    may be resumed from: their best adapters stay. All processes must make and use it alike."""

    def __init__(self, folder: Path, parameters: Parameters, keep: int = 2) -> None:
        self.folder, self.parameters = folder, list(parameters)
        self.pinned: deque[int] = deque(maxlen=keep)

    def path(self, step: int) -> Path:
        """File of the adapter after `step`."""
        return self.folder / f"step-{step:06d}" / WEIGHTS

    def has(self, step: int) -> bool:
        """Whether the adapter of `step` is there, as the first process sees it."""
        return bool(exchange(self.path(step).is_file(), "the best adapter")[0])

    def pin(self, step: int) -> None:
        """A checkpoint that names `step` as the best is being written: keep that file while it is of use."""
        self.pinned.append(step)

    def keep(self, step: int) -> None:
        """Write the present parameters as those of `step`, all or nothing, and remove those no longer needed.

        Raises:
            DiskError: no room, or not writable.
            NumericError: a parameter is not finite.
        """
        content = parameter_bytes(self.parameters)
        if not world().is_main:
            return
        path = self.path(step)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                flush_to_disk(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            flush_to_disk(path.parent)
        needed = {self.path(s).parent for s in (step, *self.pinned)}
        for old in self.folder.glob("step-*"):
            if old not in needed:
                shutil.rmtree(old)

    def restore(self, step: int) -> None:
        """Put the parameters of `step` back. Raises VerificationError for a damaged file."""
        load_parameters(self.path(step).parent, self.parameters)
