"""`vfl-train profile --profile P`: another's profile of this model, checked and taken instead."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vfl_train.errors import ConfigError
from vfl_train.hub.load import profile_file
from vfl_train.profiling.show import layers_table
from vfl_train.report.heatmap import save_heatmap
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import Profile
from vfl_train.training.skeleton import load_skeleton

if TYPE_CHECKING:
    from vfl_train.config import ProfileConfig

log = logging.getLogger(__name__)


def take_profile(config: ProfileConfig) -> Profile | None:
    """Read `config.profile` (a path or a Hub repo), compare it with the model (no weights are read), and
    write profile.json and profile.png. Returns None with `dry_run`.

    Raises:
        ConfigError: no profile there, one of another kind of model, or with too little in it to draw.
        HubError: the Hub cannot be reached.
    """
    assert config.profile is not None
    source = profile_file(config.profile)
    found = Profile.load(source)
    for warning in found.check_model(load_skeleton(config.model, config.revision).info):
        log.warning("%s", warning)
    try:
        Console().print(layers_table(found))
        if not config.dry_run:
            _write(config, source, found)
    except (ValueError, TypeError, KeyError, IndexError) as e:  # keys that no command reads are not checked
        raise ConfigError(f"{config.profile} cannot be shown: {type(e).__name__}: {e}") from e
    return None if config.dry_run else found


def _write(config: ProfileConfig, source: Path, found: Profile) -> None:
    wanted = fingerprint("profile", config, {"profile": file_sha256(source)})
    with RunFolder.open(Path(config.output), wanted, config.overwrite) as run:
        if not run.already_done:
            run.write_bytes("profile.json", source.read_bytes())
            with run.replacing("profile.png") as path:
                save_heatmap(found, path)
