"""The state of a training run as files: safetensors and JSON, nothing that could run code when it is read.

    adapter_model.safetensors   the trained tensors under PEFT's names, at full precision
    optimizer.safetensors       NAME/exp_avg, NAME/exp_avg_sq, NAME/step of every trained parameter
    optimizer.json              settings of the parameter groups
    scheduler.json              position of the learning rate's course
    rng.safetensors             random number generators and open loss sums, RANK/python, RANK/torch, ...

Under DeepSpeed ZeRO every process holds a part; the parts are gathered, so that the files are the same for
every strategy. All processes must call these functions together.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vfl_train.errors import NumericError, VerificationError
from vfl_train.training.deepspeed import master_weights
from vfl_train.training.distributed import exchange

Parameters = Sequence[tuple[str, torch.nn.Parameter]]
WEIGHTS, OPTIMIZER, GROUPS = "adapter_model.safetensors", "optimizer.safetensors", "optimizer.json"
SCHEDULER, RANDOM = "scheduler.json", "rng.safetensors"
_PYTHON_WORDS, _NUMPY_WORDS = 625, 624  # of both Mersenne twisters


# --- trained parameters ------------------------------------------------------------------------------


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO keeps the parameter's master copy in parts."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def set_parameter(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite the parameter, under ZeRO its master copy too."""
    value = value.to(parameter.device)
    if not is_partitioned(parameter):
        parameter.data.copy_(value)
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, value.float())
    parts = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=parts):
        parameter.data.copy_(value)


def parameter_bytes(parameters: Parameters) -> bytes:
    """`adapter_model.safetensors`. Raises NumericError naming a parameter that is not finite."""
    tensors = {}
    for name, tensor in master_weights(parameters).items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(f"{name} is not finite; it was not saved", "lower learning_rate")
        tensors[_peft_name(name)] = tensor.contiguous()
    return save(tensors, metadata={"format": "pt"})


def load_parameters(folder: Path, parameters: Parameters) -> None:
    """Overwrite the trained parameters with those of a checkpoint. Raises VerificationError."""
    tensors = _read(folder / WEIGHTS)
    _same_names(folder / WEIGHTS, set(tensors), {_peft_name(name) for name, _ in parameters})
    for name, parameter in parameters:
        value = tensors[_peft_name(name)]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if value.shape != shape:
            raise VerificationError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(value.shape)}, the plan's is {tuple(shape)}",
                "the rank or the model has changed; start again with --overwrite",
            )
        set_parameter(parameter, value)


def _peft_name(name: str) -> str:
    """A parameter's name in an adapter file: without the adapter's own name."""
    return name.replace(".default.", ".")


# --- optimizer and learning rate ---------------------------------------------------------------------


def optimizer_files(optimizer: Any, parameters: Parameters) -> dict[str, bytes]:
    """`optimizer.safetensors` and `optimizer.json`. Raises NumericError for a state that is not finite."""
    base = _base_optimizer(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        for key, value in _state_of(base, parameter).items():
            tensor = torch.as_tensor(value).detach().cpu()
            if not bool(torch.isfinite(tensor).all()):
                raise NumericError(f"{key} of {name} is not finite; it was not saved", "lower learning_rate")
            tensors[f"{name}/{key}"] = tensor.contiguous().clone()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups]
    return {OPTIMIZER: save(tensors), GROUPS: _json(groups)}


def load_optimizer(folder: Path, optimizer: Any, parameters: Parameters, keep_settings: bool) -> None:
    """Put the optimizer where a checkpoint left it; `keep_settings` leaves its learning rate and the like as
    configured now. Raises VerificationError."""
    base = _base_optimizer(optimizer)
    tensors, groups = _read(folder / OPTIMIZER), _read_json(folder / GROUPS)
    by_name: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _ in parameters}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    with_state = {name for name, state in by_name.items() if state}
    _same_names(folder / OPTIMIZER, with_state, {name for name, _ in parameters})
    for name, parameter in parameters:
        _set_state(base, optimizer, parameter, by_name[name])
    if len(groups) != len(base.param_groups):
        raise VerificationError(f"{folder / GROUPS} has {len(groups)} groups, not {len(base.param_groups)}")
    if not keep_settings:
        for group, saved in zip(base.param_groups, groups, strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def scheduler_file(scheduler: Any) -> bytes:
    """`scheduler.json`."""
    return _json({k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"})


def load_scheduler(folder: Path, scheduler: Any, keep_settings: bool) -> None:
    """Put the learning rate's course where a checkpoint left it. With `keep_settings` only its position is
    taken, and the rates are those that the present settings give there. Raises VerificationError."""
    saved = _read_json(folder / SCHEDULER)
    base = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if not keep_settings:
        base.__dict__.update(saved)
        return
    base.last_epoch, base._step_count = saved["last_epoch"], saved["_step_count"]
    rates = [rate * f(base.last_epoch) for rate, f in zip(base.base_lrs, base.lr_lambdas, strict=True)]
    for group, rate in zip(base.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    base._last_lr = rates


def _base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer below accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _state_of(base: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Optimizer state of one parameter, whole: tensors of its shape, and the scalar `step`."""
    if not is_partitioned(parameter):
        return dict(base.state[parameter])
    from deepspeed.utils import safe_get_full_optimizer_state

    # Sorted: each value is summed over all processes, which must ask for the same one at the same time.
    flat: Mapping[str, Any] = next(iter(base.state.values()), {})
    return {
        key: value if value.numel() == 1 else safe_get_full_optimizer_state(parameter, key)
        for key, value in ((k, torch.as_tensor(flat[k])) for k in sorted(flat))
    }


def _set_state(
    base: torch.optim.Optimizer,
    wrapped: Any,
    parameter: torch.nn.Parameter,
    state: Mapping[str, torch.Tensor],
) -> None:
    if not is_partitioned(parameter):
        base.state[parameter] = {
            # torch keeps `step` on the CPU unless it is fused or capturable; it moves it itself when needed
            key: value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
            for key, value in state.items()
        }
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    _prepare_zero_state(base, wrapped, state)
    for key, value in state.items():
        if value.dim():
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _prepare_zero_state(base: torch.optim.Optimizer, wrapped: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Give the flat partitions of ZeRO, which have no state before the first step, one to be filled."""
    zero = getattr(wrapped, "optimizer", wrapped)
    flat = getattr(zero, "fp32_partitioned_groups_flat", None)  # stage 3
    if flat is None:
        flat = zero.single_partition_of_fp32_groups
    for partition in flat:
        if not base.state[partition]:
            base.state[partition] = {
                key: value.clone() if value.dim() == 0 else torch.zeros_like(partition)
                for key, value in state.items()
            }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


# --- random numbers ------------------------------------------------------------------------------------


def random_state() -> dict[str, torch.Tensor]:
    """State of all generators of this process, as uint8 vectors of fixed lengths: `python`, `numpy`, `torch`,
    and `cuda` (the current device) where there is one."""
    _, words, gauss = random.getstate()
    python = struct.pack(f"<{_PYTHON_WORDS}I?d", *words, gauss is not None, gauss or 0.0)
    legacy: Any = np.random.get_state(legacy=True)
    numpy = struct.pack(f"<{_NUMPY_WORDS}Iiid", *legacy[1].tolist(), *legacy[2:])
    found = {"python": _bytes(python), "numpy": _bytes(numpy), "torch": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put all generators back to a `random_state`."""
    *words, has_gauss, gauss = struct.unpack(f"<{_PYTHON_WORDS}I?d", state["python"].numpy().tobytes())
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *keys, position, has_gauss, gauss = struct.unpack(
        f"<{_NUMPY_WORDS}Iiid", state["numpy"].numpy().tobytes()
    )
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rank_file(own: Mapping[str, torch.Tensor]) -> bytes:
    """`rng.safetensors`: the uint8 vectors of every process under `RANK/name`."""
    texts = {name: tensor.numpy().tobytes().hex() for name, tensor in own.items()}
    every = exchange(texts, "the state of the random generators")
    return save(
        {
            f"{r}/{name}": _bytes(bytes.fromhex(text))
            for r, its in enumerate(every)
            for name, text in its.items()
        }
    )


def load_rank(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """What `rank_file` holds of one process; empty if the run had fewer. Raises VerificationError."""
    tensors = _read(folder / RANDOM)
    prefix = f"{rank}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def float_bytes(value: float) -> torch.Tensor:
    """A float64 as a uint8 vector, exactly."""
    return _bytes(struct.pack("<d", value))


def bytes_float(vector: torch.Tensor) -> float:
    """The number in a `float_bytes`."""
    return float(struct.unpack("<d", vector.numpy().tobytes())[0])


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# --- files -----------------------------------------------------------------------------------------------


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("utf-8")


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name: safetensors gives them in another order in every process."""
    try:
        return dict(sorted(load(path.read_bytes()).items()))
    except (OSError, SafetensorError) as e:
        raise VerificationError(f"{path} cannot be read: {e}", "remove this checkpoint") from e


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise VerificationError(f"{path} cannot be read: {e}", "remove this checkpoint") from e


def _same_names(path: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        first = sorted(wanted - found)[:1] or sorted(found - wanted)
        raise VerificationError(
            f"{path} is of another plan: {len(wanted - found)} tensors missing, {len(found - wanted)} "
            f"unplanned ({first[0]})",
            "start again with --overwrite",
        )
