"""Settings that several commands share, and the checks on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vfl_train.errors import ConfigError
from vfl_train.options import Config, option
from vfl_train.schemas import LAYER_RULES, check_function_name

DTYPES = ("auto", "float32", "bfloat16", "float16")

_DEVICE = re.compile(r"(auto|cpu|mps|cuda(:\d+)?)\Z")
_FUNCTIONS_HELP = "Vision functions, separated by commas."
_IMAGE_ROOT_HELP = "Folder that image paths resolve under; nothing outside it is read. [the data's folder]"


def output_option(what: str) -> Path:
    """`--output`, required; `what` is written there."""
    return option(help=f"Folder to write {what} to.", metavar="DIR", shared=False)


def overwrite_option() -> bool:
    """`--overwrite`."""
    return option(False, help="Replace what an earlier run left in the output folder.")


def dry_run_option() -> bool:
    """`--dry-run`."""
    return option(False, help="Say what would be done and what it costs, then stop.")


def functions_option(default_text: str, shared: bool = True) -> tuple[str, ...]:
    """`--functions`; `default_text` says what none given means."""
    return option((), help=f"{_FUNCTIONS_HELP} {default_text}".strip(), metavar="NAME,..", shared=shared)


def layer_rule_option() -> str:
    """`--layer-rule`."""
    return option(
        "block", choices=LAYER_RULES, help="Which layers of the profile: the flip block or the papers' rule."
    )


def image_root_option() -> Path | None:
    """`--image-root`."""
    return option(None, help=_IMAGE_ROOT_HELP, metavar="DIR")


def at_least(config: Config, **minima: float) -> None:
    """Raises ConfigError for a field below its minimum; None passes."""
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {minimum}, not {value}")


def check_functions(names: tuple[str, ...]) -> None:
    """Raises ConfigError for a name that no function may have, or one given twice."""
    for name in names:
        check_function_name(name)
    if len(set(names)) != len(names):
        raise ConfigError(f"--functions names one twice: {', '.join(names)}")


def check_device(device: str) -> None:
    """Raises ConfigError unless torch could know `device`."""
    if not _DEVICE.match(device):
        raise ConfigError(f"--device must be auto, cpu, mps, cuda or cuda:N, not {device!r}")


def check_what_is_scored(probes: Path | None, data: str | None, match: str) -> None:
    """Raises ConfigError for both `--probes` and `--data`, or a `--match` without the rows it judges."""
    if probes is not None and data is not None:
        raise ConfigError("--probes and --data exclude each other", "give one of them")
    if match != "exact" and data is None:
        raise ConfigError("--match is for --data", "each probe pair says itself how it is judged")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """What every command that loads a model understands."""

    model: str = option(
        "phantom",
        group="model",
        metavar="NAME",
        help="Model folder, Hub id, or `phantom`, the bundled calibration model.",
    )
    revision: str | None = option(
        None,
        group="model",
        metavar="COMMIT",
        help="Commit of a Hub model; pin it to be able to repeat a run.",
    )
    dtype: str = option("auto", group="model", choices=DTYPES, help="Number format of the weights.")
    device: str = option("auto", group="model", help="auto, cpu, mps, cuda or cuda:N.")
    load_in_4bit: bool = option(
        False, group="model", help="Load the weights in 4 bits; needs the extra `quant`."
    )
    load_in_8bit: bool = option(
        False, group="model", help="Load the weights in 8 bits; needs the extra `quant`."
    )
    max_pixels: int | None = option(
        None, group="model", help="Largest image the processor passes on, in pixels; larger ones are scaled."
    )
    limit: int | None = option(None, group="model", help="Use at most this many rows (or pairs a function).")
    seed: int = option(0, group="model", help="Seed of everything random.")

    def check(self) -> None:
        at_least(self, max_pixels=1, limit=1, seed=0)
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("--load-in-4bit and --load-in-8bit exclude each other", "give one of them")
        check_device(self.device)
        if not self.model.strip():
            raise ConfigError("--model is empty", "give a folder, a Hub id or phantom")
