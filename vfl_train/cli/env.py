"""`vfl-train env`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import click

from vfl_train import __version__
from vfl_train.cli.command import config_command
from vfl_train.options import Config

PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers",
    "safetensors", "huggingface_hub", "pyarrow", "pillow", "numpy", "deepspeed", "bitsandbytes", "flash_attn",
    "triton", "kernels",
)  # fmt: skip


@config_command("env", Config, "vfl-train env")
def env(config: Config) -> None:
    """Print versions and the device, to paste into an issue.

    No paths, no names, no tokens.
    """
    for name, value in facts():
        click.echo(f"{name:16} {value}")


def facts() -> Iterator[tuple[str, str]]:
    """What may matter for a bug report, as (name, value)."""
    yield "vfl-train", __version__
    yield "python", platform.python_version()
    yield "system", f"{platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "-"
    yield "device", _device()


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"cuda {torch.version.cuda}: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads"
