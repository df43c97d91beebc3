"""What memory a device has and what was used of it, and whether a model's weights are on this machine."""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from vfl_train.models.vlm import resolve_name


def weights_at_hand(name: str, revision: str | None = None) -> bool:
    """Whether loading the model needs no download. Raises ConfigError for a name that is none."""
    path, local = resolve_name(name)
    if not local:
        try:
            path = snapshot_download(path, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, OSError, ValueError):
            return False
    folder, index = Path(path), Path(path) / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def free_memory(device: str) -> int:
    """Bytes that a model may take on a device of the settings (`auto`, `cpu`, `cuda:1`, ...)."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(None if device in ("auto", "cuda") else torch.device(device))[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):  # no Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def start_of_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts (on the CPU only where Linux lets the process reset it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without it the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `start_of_peak`: of the device by torch, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
