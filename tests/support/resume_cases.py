"""Runs on a tiny model that are killed, damaged or changed and resumed, each in a fork (see `nursery`)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nursery import forked
from world_rows import in_turn, world_rows, write_jsonl

from vfl_train.config import LoraConfig
from vfl_train.phantom.architecture import build_model, build_processor

ROWS = 10  # not a multiple of the batch size times the accumulation: the last step of an epoch is short


def build_tiny(folder: Path) -> Path:
    """A three-layer Qwen2.5-VL of random weights, and rows about the phantom's world. Returns `folder`."""
    folder.mkdir(exist_ok=True)
    processor = build_processor()
    config = build_model(processor, seed=0).config
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.layer_types = 3, text.layer_types[:3]
    vision.depth, vision.fullatt_block_indexes = 1, [0]
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    write_rows(folder / "data", ROWS)
    return folder


def write_rows(folder: Path, count: int) -> Path:
    """`rows.jsonl` with `count` rows about scenes of the phantom's world, and their pictures."""
    folder.mkdir()
    return write_jsonl(folder / "rows.jsonl", world_rows(folder, in_turn(count)))


def tiny_config(tiny: Path, output: Path, **changes: Any) -> LoraConfig:
    """Five steps on the tiny model with dropout, a checkpoint after each second one; `changes` win."""
    settings: dict[str, Any] = {
        "model": str(tiny / "base"), "data": str(tiny / "data" / "rows.jsonl"), "output": output,
        "device": "cpu", "layers": "1-2", "max_steps": 5, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "logging_steps": 1, "lora_dropout": 0.2,
        "lora_r": 4, "save_steps": 2,
    }  # fmt: skip
    return LoraConfig(**{**settings, **changes})


class Watched:
    """What a run did: the rows of each micro-batch, and the sha256 of its last checkpoint's files. `at_save`
    is called with the step after each checkpoint."""

    def __init__(self, at_save: Callable[[int], None] = lambda step: None) -> None:
        from vfl_train.training import checkpoint
        from vfl_train.training.guards import StepGuard

        self.order: list[list[int]] = []
        self.state: dict[str, str] = {}
        add, save = StepGuard.add, checkpoint.save

        def noted(guard: Any, loss: Any) -> None:
            self.order.append(list(guard.rows))
            add(guard, loss)

        def hashed(root: Path, step: int, files: dict[str, bytes], *args: Any, **kwargs: Any) -> Path:
            self.state = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            folder = save(root, step, files, *args, **kwargs)
            at_save(step)
            return folder

        StepGuard.add, checkpoint.save = noted, hashed  # type: ignore[method-assign]

    def summary(self, output: Path) -> dict[str, Any]:
        """Everything that a resumed run must have in common with the uninterrupted one."""
        log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
        clock = ("seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        timed = ("progress.json", "trainer_state.json")  # hold seconds
        return {
            "adapter": hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "state": {name: sha for name, sha in self.state.items() if name not in timed},
            "order": self.order,
            "log": [{k: v for k, v in entry.items() if k not in clock} for entry in log],
        }


def run(config: LoraConfig) -> dict[str, Any]:
    """Train as `config` says."""
    from vfl_train.training.run import train_lora

    watched = Watched()
    return watched.summary(train_lora(config))


# --- R1 ------------------------------------------------------------------------------------------------


def crash_everywhere(tiny: Path, root: Path) -> dict[str, Any]:
    """One run; its second save is done in forks that are killed at each of its disk calls, every time in a
    copy of the output folder, which is then resumed. Returns the run's summary and those of the resumed."""
    from vfl_train.training.run import train_lora

    copies: list[str] = []

    def first() -> dict[str, Any]:
        from vfl_train.training.resume import Checkpoints

        save = Checkpoints.save

        def crashing(self: Checkpoints) -> None:
            if self.trainer.state.global_step == 4:
                output, whole, numbers = self.root.parent, self.root, random.getstate()
                extra = self.extra
                self.extra = {"adapter_config.json": extra["adapter_config.json"]}  # the others are like it

                def in_fork() -> None:
                    random.setstate(numbers)  # a fork seeds Python's generator anew
                    save(self)

                while True:
                    copy = root / f"crash-{len(copies) + 1}"
                    shutil.copytree(output, copy)
                    self.root = copy / "checkpoints"
                    copies.append(copy.name)
                    code, _ = forked(die_at, len(copies), in_fork)
                    if code == 0:
                        break
                    assert code == -signal.SIGKILL, code
                self.root, self.extra = whole, extra
            save(self)

        Checkpoints.save = crashing  # type: ignore[method-assign]
        watched = Watched()
        summary = watched.summary(train_lora(tiny_config(tiny, root / "whole")))
        return {**summary, "copies": copies}

    code, whole = forked(first)
    assert code == 0, whole
    resumed = []
    for name in whole.pop("copies"):
        left = [p.name for p in (root / name / "checkpoints").iterdir()]
        code, summary = forked(run, tiny_config(tiny, root / name))
        resumed.append({"left": left, "code": code, "summary": summary})
    return {"whole": whole, "resumed": resumed}


CALLS = ("mkdir", "write", "fsync", "rename", "unlink", "rmdir")


def die_at(boundary: int, call: Callable[[], object]) -> int:
    """Run `call` and SIGKILL this process at its `boundary`-th call that changes the disk, a write half done.
    Returns the number of such calls if there were fewer."""
    count = 0

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def wrapper(*args: Any, **kwargs: Any) -> object:
            nonlocal count
            count += 1
            if count == boundary:
                if name == "write":
                    real(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(name))
    call()
    return count


# --- R3 ------------------------------------------------------------------------------------------------


def resume_from_each(tiny: Path, root: Path, stops: list[int], changes: dict[str, Any]) -> dict[str, Any]:
    """An uninterrupted run without checkpoints on the way, one with a checkpoint each step, and one resumed
    from what lay on the disk after each of `stops`. Returns the summaries."""
    from vfl_train.training.run import train_lora

    def stored() -> dict[str, Any]:
        output = root / "stored"

        def copy(step: int) -> None:
            if step in stops:
                shutil.copytree(output, root / f"stopped-{step}")

        watched = Watched(copy)
        train_lora(tiny_config(tiny, output, save_steps=1, **changes))
        return watched.summary(output)

    results = {
        "whole": forked(run, tiny_config(tiny, root / "whole", save_steps=0, **changes)),
        "stored": forked(stored),
    }
    for step in stops:
        output = root / f"stopped-{step}"
        results[str(step)] = forked(run, tiny_config(tiny, output, save_steps=1, **changes))
    for name, (code, summary) in results.items():
        assert code == 0, f"{name}: {summary}"
    return {name: summary for name, (_, summary) in results.items()}


# --- damage and other settings -------------------------------------------------------------------------


def as_command(config: LoraConfig) -> int:
    """`vfl-train lora`: its exit code; its messages go to stderr."""
    import click

    from vfl_train.cli.main_group import CliState, exit_code_of, messages, sigterm
    from vfl_train.training.run import train_lora

    def call() -> None:
        try:
            train_lora(config)
        except KeyboardInterrupt as e:  # as click does, which is not here
            raise click.exceptions.Abort from e

    with messages(), sigterm():
        return exit_code_of(call, CliState())


def told(output: Path, call: Callable[[], Any]) -> dict[str, Any]:
    """Run `call` in a fork. Returns its exit code, what it wrote to stderr, and the checkpoints it left."""
    errors = output.with_suffix(".err")

    def quiet() -> Any:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
        return call()

    code, answer = forked(quiet)
    checkpoints = output / "checkpoints"
    return {
        "code": answer if code == 0 else code,
        "stderr": errors.read_text(),
        "checkpoints": sorted(p.name for p in checkpoints.iterdir()) if checkpoints.is_dir() else [],
    }


def killed_at(tiny: Path, output: Path, step: int) -> None:
    """A run killed right after its checkpoint of `step`."""

    def killed() -> None:
        Watched(lambda saved: os.kill(os.getpid(), signal.SIGKILL) if saved == step else None)
        as_command(tiny_config(tiny, output))

    code, answer = forked(killed)
    assert code == -signal.SIGKILL, answer


def damages(tiny: Path, root: Path) -> dict[str, Any]:
    """A run killed after step 4, each time with another file of that checkpoint damaged; all checkpoints
    damaged; and what an interrupted save leaves."""
    killed_at(tiny, root / "run", 4)
    results: dict[str, Any] = {"whole": forked(run, tiny_config(tiny, root / "whole"))[1]["adapter"]}

    def resume(name: str, *damaged: str) -> None:
        output = root / name
        for path in damaged:
            os.truncate(output / "checkpoints" / path, 10)
        results[name] = told(output, partial(as_command, tiny_config(tiny, output)))
        adapter = output / "adapter_model.safetensors"
        if adapter.is_file():
            results[name]["adapter"] = hashlib.sha256(adapter.read_bytes()).hexdigest()

    files = ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "progress.json")
    for name in (*files, "MANIFEST.json"):
        shutil.copytree(root / "run", root / name)
        resume(name, f"step-000004/{name}")
    shutil.copytree(root / "run", root / "all")
    resume("all", "step-000002/rng.safetensors", "step-000004/rng.safetensors")
    shutil.copytree(root / "run", root / "loose")
    shutil.copytree(root / "run/checkpoints/step-000004", root / "loose/checkpoints/.tmp-5-1")
    resume("loose")
    return results


def drifts(tiny: Path, root: Path) -> dict[str, Any]:
    """A run killed after its first checkpoint, then the same command with something changed."""
    killed_at(tiny, root / "run", 2)
    edited = root / "edited"
    shutil.copytree(tiny / "data", edited)
    rows = (edited / "rows.jsonl").read_text().splitlines()
    rows[3] = rows[3].replace('"assistant", "content": "', '"assistant", "content": "not ')
    (edited / "rows.jsonl").write_text("\n".join(rows) + "\n")
    cases: dict[str, dict[str, Any]] = {
        "lr": {"learning_rate": 2e-3},
        "layers": {"layers": "0-1"},
        "data": {"data": str(edited / "rows.jsonl")},
        "seed": {"seed": 1},
        "no such key": {"learning_rate": 2e-3, "allow_config_change": ("learning_rat",)},
        "lr allowed": {"learning_rate": 2e-3, "allow_config_change": ("learning-rate",)},
        "same": {},
        "other things": {"save_steps": 1, "dataloader_num_workers": 2},
    }
    results = {}
    for name, changes in cases.items():
        output = root / name.replace(" ", "-")
        shutil.copytree(root / "run", output)
        config = tiny_config(tiny, output, **changes)
        results[name] = told(output, partial(as_command, config))
    output = root / "world"
    shutil.copytree(root / "run", output)
    from vfl_train.training import run as module
    from vfl_train.training.distributed import World

    module.world = lambda: World(size=2)
    results["world"] = told(output, lambda: as_command(tiny_config(tiny, output)))
    return results
