"""`vfl-train migrate`: an adapter under module names of before transformers 4.52 renamed to today's, or back.

Only names change: the tensors are written as they are, in the same number format. The result is a folder with
a manifest, which `export` and `verify` take, so this is also how an adapter made elsewhere comes in.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.card import renamed_card, unpublished
from vfl_train.hub.contents import MIGRATION_RECORD
from vfl_train.hub.keys import Names, lora_shapes
from vfl_train.hub.load import CONFIG, PEFT_PREFIX, WEIGHTS, AdapterInfo, base_of, check_adapter
from vfl_train.hub.privacy import public_name
from vfl_train.hub.targets import adapter_config, processor_files, rewritten_weights
from vfl_train.runs import RunFolder, file_sha256, fingerprint

if TYPE_CHECKING:
    from vfl_train.config import MigrateConfig

_KEPT = ("LICENSE", "NOTICE", "logits_reference.json", "train_config.yaml")
log = logging.getLogger(__name__)


def migrate(config: MigrateConfig) -> Path:
    """Write the adapter of `config` under the names that --to asks for, with the names it had in
    migration.json.

    Returns:
        The output folder (where there is nothing to rename, it is said, and the adapter is in it as it was).

    Raises:
        ConfigError: no adapter, names that are neither today's nor those before 4.52 (the first is named),
            or a base that only the adapter names and that is not on this machine.
        VerificationError: the renamed adapter does not fit the base model, or would do nothing.
    """
    from vfl_train.training.skeleton import load_skeleton

    info = check_adapter(config.adapter)
    base, revision = base_of([info], config.model)
    names = Names(load_skeleton(base, revision).model)
    renamed = renames(info, names, config.to)
    changed = sum(old != new for old, new in renamed.items())
    if not changed:
        log.warning(
            "%s: nothing to migrate, its %d modules have the %s names already",
            info.folder, len(renamed), config.to,
        )  # fmt: skip
    check_result(info, names)
    inputs = {name: file_sha256(info.folder / name) for name in (WEIGHTS, CONFIG)}
    with RunFolder.open(
        config.output, fingerprint("migrate", config, inputs, ("transformers",)), config.overwrite
    ) as run:
        if run.already_done:
            log.info("%s: already done", run.folder)
            return run.folder
        run.write_bytes(WEIGHTS, rewritten_weights(info, renamed))
        value = adapter_config(info, sorted(renamed.values()), base_model_name_or_path=base)
        run.write_json(CONFIG, value)
        run.write_text("README.md", renamed_card(value, unpublished(base, revision)))
        for source in [*processor_files(info.folder), *(info.folder / name for name in _KEPT)]:
            if source.is_file():
                shutil.copyfile(source, run.path(source.name))
        run.write_json(MIGRATION_RECORD, _record(config.to, base, renamed))
    log.info("%s: %d of %d modules renamed", run.folder, changed, len(renamed))
    return run.folder


def renames(info: AdapterInfo, names: Names, to: str) -> dict[str, str]:
    """Name in the adapter -> name that is asked for (`current` or `legacy`). Raises ConfigError naming the
    first module that is unknown under both, or two that would become one."""
    current = {module: names.current(module) for module in sorted(info.modules)}
    strange = [old for old, new in current.items() if not names.knows(new)]
    if strange:
        raise ConfigError(
            f"{info.folder} adapts {strange[0]}, which the base model has under no name, today's or older "
            f"({len(strange)} of {len(current)} modules are unknown)",
            "it was trained on another model: give its base with --model",
        )
    wanted = {old: new if to == "current" else names.legacy(new) for old, new in current.items()}
    twice = sorted(new for new in wanted.values() if list(wanted.values()).count(new) > 1)
    if twice:
        raise ConfigError(f"{info.folder} holds {twice[0]} under two names", "it mixes two adapters")
    return wanted


def check_result(info: AdapterInfo, names: Names) -> None:
    """Raises VerificationError unless every module has the size it has in the base and some B is not zero:
    together this is an adapter that changes what the model says."""
    from safetensors.torch import load_file

    shapes = lora_shapes(info.folder / WEIGHTS, PEFT_PREFIX)
    names.check_fit({names.current(module): pair for module, pair in shapes.items()}, str(info.folder))
    tensors = load_file(str(info.folder / WEIGHTS))
    if not any(bool(t.any()) for name, t in tensors.items() if ".lora_B." in name):
        raise VerificationError(f"{info.folder} does nothing: all of its lora_B are zero", "train it again")


def _record(to: str, base: str, renamed: dict[str, str]) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "to": to, "base": public_name(base), "renamed": renamed,
        "versions": {name: version(name) for name in ("transformers", "peft")},
    }  # fmt: skip
