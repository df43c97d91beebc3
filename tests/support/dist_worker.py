"""A launched process as tests want it: `python -m dist_worker FOLDER` instead of `vfl_train.cli.worker`.

VFL_TEST holds a JSON list of [name, changes of the settings, changes on rank 1 only]. Each entry is one call
of train_lora; what every rank saw of it (first gradients, backward visits, error) goes to NAME-rank-K.*
beside the outputs. One launch serves many cases, because the imports are what costs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from backward_visits import watch
from safetensors.torch import save_file

from vfl_train.cli import worker
from vfl_train.config import LoraConfig
from vfl_train.errors import VflError
from vfl_train.training import agreement, trainer
from vfl_train.training.adapter import trainable_parameters
from vfl_train.training.distributed import session
from vfl_train.training.run import train_lora


class Observed:
    """One training run: its LoRA B gradients at step 1 (whole, averaged over processes), and what backward
    visited. Use as a context around `train_lora`."""

    def __init__(self, fault: str | None = None, died: Path = Path()) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.backward: dict[str, int] = {}
        self.below: dict[str, int] = {}
        self.forward: dict[str, int] = {}
        self.slices: list[int] = []
        self.fault, self.died = fault, died

    def __enter__(self) -> Observed:
        self._train, self._on_step = trainer.train, trainer.StepGuard.on_pre_optimizer_step
        trainer.train = self._watched
        observed = self

        def before_step(guard: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "deepspeed" not in str(type(kwargs.get("optimizer"))).lower():
                observed._note(guard.parameters, lambda p: p.grad)
            observed._break(state.global_step)
            observed._on_step(guard, args, state, control, **kwargs)

        trainer.StepGuard.on_pre_optimizer_step = before_step
        if self.fault == "other initial adapter":
            agreement.initial_state, self._initial = (lambda parameters: "other"), agreement.initial_state
        if self.fault == "one batch more":
            agreement.check_steps, self._steps = (lambda n: self._steps(n + 1)), agreement.check_steps
        return self

    def __exit__(self, *error: object) -> None:
        trainer.train, trainer.StepGuard.on_pre_optimizer_step = self._train, self._on_step
        agreement.initial_state = self._initial or agreement.initial_state
        agreement.check_steps = self._steps or agreement.check_steps
        if self._engine_step is not None:
            sys.modules["deepspeed"].DeepSpeedEngine.step = self._engine_step

    _engine_step: Any = None
    _initial: Any = None
    _steps: Any = None

    def _watched(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        decoder = model.get_base_model().get_decoder()
        self.slices = [p.ds_tensor.numel() for p in decoder.parameters() if hasattr(p, "ds_tensor")][:4]
        self._watch_deepspeed(trainable_parameters(model))
        with watch(SimpleNamespace(layers=decoder.layers, base=model.get_base_model())) as seen:
            out = self._train(model, *args, **kwargs)
        layers = [int(n.split(".layers.")[1].split(".")[0]) for n, _ in trainable_parameters(model)]
        self.backward, self.forward = dict(seen.backward), dict(seen.forward)
        self.below = dict(seen.below(min(layers)))
        return out

    def _watch_deepspeed(self, parameters: Any) -> None:
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is None or self._engine_step is not None:
            return
        self._engine_step = step = deepspeed.DeepSpeedEngine.step

        def noted(engine: Any, *args: Any, **kwargs: Any) -> Any:
            self._note(parameters, deepspeed.utils.safe_get_full_grad)
            return step(engine, *args, **kwargs)

        deepspeed.DeepSpeedEngine.step = noted

    def _note(self, parameters: Any, gradient: Any) -> None:
        if not self.gradients:
            found = {name: gradient(p) for name, p in parameters if ".lora_B." in name}
            self.gradients = {name: g.detach().float().clone() for name, g in found.items() if g is not None}

    def _break(self, step: int) -> None:
        if self.fault == "killed" and step == 1:
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hangs" and step == 1:
            signal.pause()

    def write(self, path: Path) -> None:
        """`path`.safetensors and `path`.json."""
        save_file(self.gradients, path.with_suffix(".safetensors"))
        seen = {
            "backward": self.backward, "below": self.below, "forward": self.forward, "slices": self.slices,
        }  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(seen), encoding="utf-8")


def run_cases(config: LoraConfig) -> None:
    """Every case of VFL_TEST; errors that all ranks meet together are noted, and the next case begins."""
    with session(config.device, config.ddp_timeout):
        _run_cases(config, int(os.environ["RANK"]), Path(config.output).parent)


def _run_cases(config: LoraConfig, rank: int, folder: Path) -> None:
    for name, changes, on_rank_1 in json.loads(os.environ["VFL_TEST"]):
        own = {**changes, **(on_rank_1 if rank == 1 else {})}
        fault, last = own.pop("fault", None), own.pop("last", False)
        changed = dataclasses.replace(config, output=folder / name, **own)
        with Observed(fault, folder / f"{name}-rank-{rank}.died") as seen:
            try:
                train_lora(changed)
            except VflError as error:
                if last:
                    raise
                text = json.dumps({"code": error.exit_code, "message": error.message})
                (folder / f"{name}-rank-{rank}.error").write_text(text, encoding="utf-8")
                continue
        seen.write(folder / f"{name}-rank-{rank}")


if __name__ == "__main__":
    code = worker.main(Path(sys.argv[1]), run_cases)
    if code:
        os._exit(code)
