"""A launched process for tests of resuming: `python -m resume_worker FOLDER` instead of
`vfl_train.cli.worker`. Its one call trains once without a break, once with one, and once into a NaN.

What each rank found goes to rank-K.found beside the output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from vfl_train.cli import worker
from vfl_train.config import LoraConfig
from vfl_train.errors import NumericError
from vfl_train.training import checkpoint, resume
from vfl_train.training.distributed import session
from vfl_train.training.run import train_lora
from vfl_train.training.trainer import LoraTrainer


class Cut(Exception):
    """The end of a run, in all processes at the same place."""


def run(config: LoraConfig, folder: Path, name: str) -> dict[str, str]:
    """Train into `folder`/`name`. Returns sha256 of the adapter and of the files of the last checkpoint."""
    sums: dict[str, str] = {}
    save = checkpoint.save

    def hashed(root: Path, step: int, files: dict[str, bytes], *args: Any) -> Path:
        sums.update({n: hashlib.sha256(c).hexdigest() for n, c in files.items() if "state.json" not in n})
        return save(root, step, files, *args)

    checkpoint.save = hashed
    try:
        output = train_lora(dataclasses.replace(config, output=folder / name))
    finally:
        checkpoint.save = save
    sums.pop("progress.json", None)  # holds seconds
    return {**sums, "final": hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()}


def cut_after(config: LoraConfig, folder: Path, name: str, step: int) -> None:
    """The same, ended after the checkpoint of `step`."""
    save = resume.Checkpoints.save

    def cutting(self: resume.Checkpoints) -> None:
        save(self)
        if self.trainer.state.global_step == step:
            raise Cut

    resume.Checkpoints.save = cutting  # type: ignore[method-assign]
    try:
        train_lora(dataclasses.replace(config, output=folder / name))
    except Cut:
        pass
    finally:
        resume.Checkpoints.save = save  # type: ignore[method-assign]


def poisoned(config: LoraConfig, folder: Path, rank: int) -> dict[str, Any]:
    """NaN in the loss of rank 1 at step 3. Returns the error's message and the rows of that batch."""
    compute, rows = LoraTrainer.compute_loss, []

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if rank == 1 and self.state.global_step == 2:
            rows.extend(self.guard.rows)
            self.guard.window[-1] = (self.guard.window[-1][0], torch.tensor(float("nan")))
            loss = loss * float("nan")
        return loss

    LoraTrainer.compute_loss = spoilt  # type: ignore[method-assign]
    try:
        train_lora(dataclasses.replace(config, output=folder / "poisoned"))
    except NumericError as error:
        return {"message": error.message, "rows": rows}
    finally:
        LoraTrainer.compute_loss = compute  # type: ignore[method-assign]
    return {"message": "", "rows": rows}


def cases(config: LoraConfig) -> None:
    """All of it."""
    folder, rank = Path(config.output).parent, int(os.environ["RANK"])
    with session(config.device, config.ddp_timeout):
        found: dict[str, Any] = {"whole": run(config, folder, "whole")}
        cut_after(config, folder, "cut", 2)
        found["left"] = sorted(p.name for p in (folder / "cut" / "checkpoints").glob("*"))
        found["resumed"] = run(config, folder, "cut")
        found["poisoned"] = poisoned(config, folder, rank)
    (folder / f"rank-{rank}.found").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    code = worker.main(Path(sys.argv[1]), cases)
    sys.stdout.flush()
    os._exit(code)
