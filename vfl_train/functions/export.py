"""`vfl-train probes export`: the built-in pairs as a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfl_train.errors import ConfigError, DiskError
from vfl_train.functions.builtin import probe_set
from vfl_train.functions.probes import save_probe_set
from vfl_train.schemas import BUILTIN_FUNCTIONS

if TYPE_CHECKING:
    from vfl_train.config import ProbesConfig


def export_probes(config: ProbesConfig) -> None:
    """Write the probe set that real models get by default. Raises ConfigError if the folder holds anything
    or a function is unknown, DiskError if it cannot be written."""
    folder = config.folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and is no empty folder", "give another one")
    probes = probe_set(config.functions or BUILTIN_FUNCTIONS, config.pairs, config.seed, config.box)
    try:
        save_probe_set(probes, folder)
    except OSError as e:
        raise DiskError(f"cannot write to {folder}: {e.strerror}", "give another folder") from e
    count = sum(map(len, probes.pairs.values()))
    print(f"{count} pairs of {', '.join(probes.pairs)} are in {folder}")
