"""DeepSpeed ZeRO-2 and ZeRO-3: its settings, loading a model in parts, and gathering what is in parts.

Under ZeRO-3 every process holds a slice of every parameter; whoever reads one gathers it first, and all
processes do so together. Nothing here uses DeepSpeed's own checkpoints, which are pickles.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError
from vfl_train.training.distributed import world

if TYPE_CHECKING:
    import torch

    from vfl_train.config import LoraConfig

NAMES = ("zero2", "zero3")
log = logging.getLogger(__name__)


def check(config: LoraConfig) -> None:
    """Raises ConfigError for a setting that cannot work, before anything is read or started: the package is
    missing; no such name or file, or no DeepSpeed settings in it; what ZeRO-3 cannot do: quantized weights, a
    prefix cache."""
    if config.deepspeed is None:
        return
    _check(read_settings(config.deepspeed), config)
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--deepspeed needs the package deepspeed", "pip install 'vfl-train[deepspeed]'")


def name_accelerator() -> None:
    """TRL imports DeepSpeed wherever it is installed, and that prints a warning on a machine without a GPU,
    unless it is told so before."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def settings_of(config: LoraConfig) -> dict[str, Any] | None:
    """DeepSpeed's settings for this process of this run, every "auto" replaced; None without --deepspeed.

    Raises:
        ConfigError: see `check`; or they contradict an option of this command.
    """
    if config.deepspeed is None:
        return None
    check(config)
    import torch

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    settings = read_settings(config.deepspeed)
    batch, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    own = {
        "train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": steps,
        "train_batch_size": batch * steps * world().size, "gradient_clipping": config.max_grad_norm,
    }  # fmt: skip
    for key, value in own.items():
        found = settings.get(key, "auto")
        if found not in ("auto", value):
            what = f"{config.deepspeed} sets {key} to {found}, the options mean {value}"
            raise ConfigError(what, 'write "auto" there')
        settings[key] = value
    if settings.setdefault("bf16", {}).get("enabled", "auto") == "auto":
        settings["bf16"]["enabled"] = not on_cpu if config.bf16 is None else config.bf16
    _drop_auto(settings)
    _prepare(on_cpu)
    return settings


def read_settings(name: str) -> dict[str, Any]:
    """The settings of that name (`zero2`, `zero3`) or in that file. Raises ConfigError."""
    if name in NAMES:
        return dict(json.loads(files("vfl_train.recipes").joinpath(f"{name}.json").read_text("utf-8")))
    path = Path(name)
    if not path.is_file():
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give {' or '.join(NAMES)}, or a JSON file"
        raise ConfigError(f"there is no DeepSpeed setting {name!r}", hint)
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not readable JSON: {e}", "correct it") from e
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise ConfigError(f"{path} has no section zero_optimization", "start from one of zero2, zero3")
    return found


def _check(settings: dict[str, Any], config: LoraConfig) -> None:
    zero, quantized = settings["zero_optimization"], config.load_in_4bit or config.load_in_8bit
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"{config.deepspeed}: zero_optimization.stage must be 1, 2 or 3")
    if zero["stage"] == 3 and quantized:
        bits = 4 if config.load_in_4bit else 8
        raise ConfigError(
            f"ZeRO-3 cannot cut {bits}-bit weights into slices: their scales belong to whole matrices",
            "use --deepspeed zero2 with them, or ZeRO-3 in bfloat16",
        )
    if zero["stage"] == 3 and config.cache_prefix:
        raise ConfigError("--cache-prefix does not work under ZeRO-3", "use --deepspeed zero2")
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise ConfigError(f"{config.deepspeed} sets {key}", "leave it to this command's options")
    for key in ("offload_param", "offload_optimizer"):
        if zero.get(key, {}).get("device") == "nvme":
            raise ConfigError(f"{config.deepspeed}: {key} to nvme is not supported", "offload to cpu")
    if settings.get("fp16", {}).get("enabled") is True:
        raise ConfigError(f"{config.deepspeed} sets fp16", "train in bfloat16 or float32")


def _drop_auto(settings: dict[str, Any]) -> None:
    """Leave every "auto" that is still there to DeepSpeed's defaults: loading reads the settings before
    transformers would replace them."""
    for key in [key for key, value in settings.items() if value == "auto"]:
        del settings[key]
    for value in settings.values():
        if isinstance(value, dict):
            _drop_auto(value)


def stage_of(settings: dict[str, Any] | None) -> int:
    """The ZeRO stage; 0 without DeepSpeed."""
    return int(settings["zero_optimization"]["stage"]) if settings else 0


def _prepare(on_cpu: bool) -> None:
    """Settings of the process. On a CPU DeepSpeed would choose an accelerator by what is installed, and
    compile an all-reduce of its own with whatever compiler it finds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    import deepspeed
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)  # takes over the group


@contextmanager
def loading_in_parts(settings: dict[str, Any] | None) -> Iterator[None]:
    """Inside, `from_pretrained` keeps a slice of each parameter only, if this is ZeRO-3."""
    if stage_of(settings) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(settings)  # transformers holds it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def gathered(parameters: Iterable[torch.Tensor]) -> Any:
    """A context in which these parameters are whole, in every process. All processes must enter it."""
    parts = [p for p in parameters if hasattr(p, "ds_id")]
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)


def in_training_dtype(model: torch.nn.Module, settings: dict[str, Any] | None) -> None:
    """Give the trained parameters the dtype ZeRO-3 computes with: PEFT makes them float32 beside a bfloat16
    base, and ZeRO-3 gathers small parameters of both into one buffer (DeepSpeed issue 8072). Their float32
    copy, the one that is trained and saved, is DeepSpeed's own."""
    import torch

    if settings is None or stage_of(settings) < 3 or not settings["bf16"]["enabled"]:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def norm_of_step(optimizer: Any) -> float | None:
    """The norm of the gradients that ZeRO has just used, over all processes; None where it is not ZeRO."""
    norm = getattr(getattr(optimizer, "optimizer", None), "_global_grad_norm", None)
    return None if norm is None else float(norm)


def master_weights(parameters: Sequence[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each parameter whole and on the CPU, in every process; all must call. Under ZeRO this is the float32
    copy that the optimizer keeps, as long as the model's own is that copy rounded: another adapter may have
    been put in the model since."""
    import torch

    out = {}
    for name, parameter in parameters:
        with gathered([parameter]):
            out[name] = parameter.detach().cpu().clone()
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            master = safe_get_full_fp32_param(parameter)
            if master is not None and torch.equal(master.cpu().to(out[name].dtype), out[name]):
                out[name] = master.detach().cpu().clone()
    return out
