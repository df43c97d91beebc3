"""Runs on the tiny model of `resume_cases` that get a signal, a full disk or a NaN, and one that is long."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nursery import forked
from resume_cases import Watched, as_command, run, tiny_config, told, write_rows

from vfl_train.config import LoraConfig


def signals(tiny: Path, root: Path) -> dict[str, Any]:
    """A signal in the middle of step 3, or of the save after step 2; a second one."""
    from vfl_train.training import checkpoint
    from vfl_train.training.trainer import LoraTrainer

    def in_step(*numbers: int, at: int = 3, group: bool = False) -> Callable[[], None]:
        def prepare() -> None:
            compute = LoraTrainer.compute_loss
            if group:
                os.setpgid(0, 0)

            def send(number: int) -> None:
                if not group:
                    return os.kill(os.getpid(), number)
                # As SLURM and systemd do, to the workers too. From outside: those let a parent end them.
                command = ["kill", f"-{number}", "--", f"-{os.getpid()}"]
                subprocess.run(command, check=True, start_new_session=True)
                time.sleep(0.2)

            def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step + 1 == at and self.model.training:
                    for number in numbers:
                        send(number)
                return compute(self, *args, **kwargs)

            LoraTrainer.compute_loss = signalled  # type: ignore[method-assign]

        return prepare

    def in_save(*numbers: int) -> Callable[[], None]:
        def prepare() -> None:
            write = checkpoint._write

            def signalled(path: Path, content: bytes) -> None:
                if path.name == "optimizer.safetensors" and "step" not in path.parent.name:
                    for number in numbers:
                        os.kill(os.getpid(), number)
                write(path, content)

            checkpoint._write = signalled

        return prepare

    term, interrupt = signal.SIGTERM, signal.SIGINT
    cases: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
        "TERM in step": (in_step(term), {}),
        "TERM in step, no checkpoints asked for": (in_step(term), {"save_steps": 0}),
        "TERM in the last step of an epoch": (in_step(term, at=5), {"max_steps": 8, "save_steps": 0}),
        "TERM to workers too": (in_step(term, group=True), {"dataloader_num_workers": 2}),
        "INT to workers too": (in_step(interrupt, group=True), {"dataloader_num_workers": 2}),
        "TERM in save": (in_save(term), {}),
        "TERM twice in step": (in_step(term, term), {}),
        "TERM then INT in save": (in_save(term, interrupt), {}),
    }
    results = {}
    for index, (name, (prepare, changes)) in enumerate(cases.items()):
        output = root / str(index)
        config = tiny_config(tiny, output, **changes)

        def call(prepare: Callable[[], None] = prepare, config: LoraConfig = config) -> int:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell leaves it ignored
            prepare()
            return as_command(config)

        results[name] = told(output, call)
        results[name]["resumed"] = told(output, partial(as_command, config))
    results["whole"] = {"sha": forked(run, tiny_config(tiny, root / "whole"))[1]["adapter"]}
    results["sha"] = {
        name: hashlib.sha256((root / str(i) / "adapter_model.safetensors").read_bytes()).hexdigest()
        for i, name in enumerate(cases)
    }
    return results


def full_disk(tiny: Path, output: Path) -> dict[str, Any]:
    """The disk is full from the second save on, as far as this process is concerned (RLIMIT_FSIZE): the
    adapter still fits, the optimizer does not. Then the same command with room again."""

    def call() -> int:
        def shrink(step: int) -> None:
            folder = output / "checkpoints" / f"step-{step:06d}"
            sizes = [
                (folder / f).stat().st_size for f in ("adapter_model.safetensors", "optimizer.safetensors")
            ]
            limit = sum(sizes) // 2
            assert sizes[0] < limit < sizes[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        Watched(shrink)
        return as_command(tiny_config(tiny, output))

    starved = told(output, call)
    return {"starved": starved, "again": told(output, lambda: as_command(tiny_config(tiny, output)))}


def filled_tmpfs(tiny: Path, output: Path) -> dict[str, Any]:
    """The same with a real full file system under `output`: something else fills it after the first save."""

    def call() -> int:
        def fill(step: int) -> None:
            with (output.parent / "ballast").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(
                        max(0, file.tell() - 60_000)
                    )  # the adapter's file fits, not the optimizer's

        Watched(fill)
        return as_command(tiny_config(tiny, output))

    starved = told(output, call)
    (output.parent / "ballast").unlink()
    return {"starved": starved, "again": told(output, lambda: as_command(tiny_config(tiny, output)))}


def no_room(tiny: Path, output: Path) -> dict[str, Any]:
    """A disk that is too small from the beginning."""

    def call() -> int:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
        watched = Watched()
        code = as_command(tiny_config(tiny, output))
        assert not watched.order, "a step was taken"
        return code

    return told(output, call)


def poisons(tiny: Path, root: Path) -> dict[str, Any]:
    """NaN in a loss, in one gradient, in one activation, each in step 3; and the rows of that step."""
    from vfl_train.training.trainer import LoraTrainer

    def in_loss(self: Any) -> None:
        from trl import SFTTrainer

        compute = SFTTrainer.compute_loss

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            if isinstance(result, tuple):
                return (result[0] * float("nan"), *result[1:])
            return result * float("nan")

        SFTTrainer.compute_loss = spoilt

    def in_gradient(self: Any) -> None:
        from vfl_train.training.adapter import trainable_parameters

        _, parameter = trainable_parameters(self.model)[3]
        parameter.register_hook(lambda g: g.flatten().index_fill(0, torch.tensor([0]), torch.nan).view_as(g))

    def in_activation(self: Any) -> None:
        """One number, at the first token, which no answer is predicted from and later ones see."""

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            output = output.clone()
            output[0, 0, 0] = float("nan")
            return output

        layer = next(m for n, m in self.model.named_modules() if n.endswith("layers.2.mlp.up_proj"))
        layer.register_forward_hook(spoil)

    results = {}
    for poison in (in_loss, in_gradient, in_activation):
        output = root / poison.__name__

        def call(poison: Any = poison, output: Path = output) -> Any:
            step = LoraTrainer.training_step
            rows: list[int] = []

            def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step == 2:
                    rows.extend(inputs["rows"])
                    poison(self)
                assert self.state.global_step < 3, "a further step was taken"
                return step(self, model, inputs, *args, **kwargs)

            LoraTrainer.training_step = poisoned  # type: ignore[method-assign]
            code = as_command(tiny_config(tiny, output))
            return {"code": code, "rows": rows}

        results[poison.__name__] = told(output, call)
    return results


# --- R24 -----------------------------------------------------------------------------------------------


def soak(tiny: Path, root: Path, steps: int, epoch: int) -> dict[str, Any]:
    """A long run with two workers and `epoch` steps an epoch: memory (MB) and open files at the end of each,
    and the children left at the end."""
    from transformers import TrainerCallback

    from vfl_train.cpu import keep_freed_memory
    from vfl_train.training.run import train_lora
    from vfl_train.training.trainer import LoraTrainer

    samples: list[tuple[int, float, int]] = []

    class Meter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % epoch == 0:
                samples.append((state.global_step, resident_megabytes(), len(os.listdir("/proc/self/fd"))))

    def call() -> dict[str, Any]:
        keep_freed_memory()
        data = write_rows(root / "data", epoch)
        attach = LoraTrainer.attach

        def with_meter(self: Any, *args: Any) -> Any:
            self.add_callback(Meter())
            return attach(self, *args)

        LoraTrainer.attach = with_meter  # type: ignore[method-assign]
        train_lora(
            tiny_config(
                tiny, root / "run", data=str(data), max_steps=steps, per_device_train_batch_size=1,
                dataloader_num_workers=2, save_steps=100, logging_steps=10,
            )
        )  # fmt: skip
        tasks = Path(f"/proc/{os.getpid()}/task")
        children = [c for task in tasks.iterdir() for c in (task / "children").read_text().split()]
        return {"samples": samples, "children": children}

    code, result = forked(call)
    assert code == 0, result
    return result


def resident_megabytes() -> float:
    """Resident memory of this process without what it has freed. `keep_freed_memory` has glibc keep that for
    later, and how much lies there swings with the size of the batches, by more than the leaks looked for."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
