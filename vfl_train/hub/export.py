"""`vfl-train export`: a finished folder made into one that can be published and that its target loads: by
allow-list, refused before anything is written, checked for secrets."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vfl_train.errors import ConfigError
from vfl_train.hub import publish
from vfl_train.hub.contents import Contents, adapter_contents, merged_contents
from vfl_train.hub.load import CONFIG, WEIGHTS
from vfl_train.hub.manifest import read_manifest, verify_manifest
from vfl_train.hub.privacy import find_secret
from vfl_train.hub.push import refuse_secrets
from vfl_train.hub.targets import PROCESSOR
from vfl_train.runs import MANIFEST, RunFolder, file_sha256, fingerprint

if TYPE_CHECKING:
    from vfl_train.config import ExportConfig

LICENCES = ("LICENSE", "NOTICE")  # go where the weights go
_COMMON = (*PROCESSOR, "README.md", "logits_reference.json", *LICENCES)
_ADAPTER = (
    *_COMMON, WEIGHTS, CONFIG, "profile.json", "plan.json", "selection.json", "train_config.yaml",
    "migration.json",
)  # fmt: skip
_MERGED = (
    *_COMMON, "config.json", "generation_config.json", "model.safetensors.index.json", "merge.json",
    "knocked_out.json",
)  # fmt: skip
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors\Z")
log = logging.getLogger(__name__)
_TEXT = (".json", ".md", ".yaml", ".jinja", ".txt")


def export(config: ExportConfig) -> Path:
    """Write the adapter or merged model of `config` for its target; with --knockout, write the model without
    the layer that the file leaves out.

    Returns:
        The output folder, with a manifest of its own.

    Raises:
        ConfigError: no such folder or one of another kind, what the target cannot load, or a token or home
            path in a file (naming the file).
        VerificationError: a file was changed since it was written, or an adapter does not fit its base.
    """
    if config.knockout is not None:
        from vfl_train.hub.knockout import export_knockout

        return export_knockout(config)
    source = Path(config.source)
    if not source.is_dir():
        raise ConfigError(f"there is no folder {source}", "give the output of lora or merge")
    kind = publish.kind_of(source)
    if kind is None:
        raise ConfigError(
            f"{source} is no adapter, merged model, profile or selection", "give the output of lora or merge"
        )
    if kind in publish.RECORDS:
        return publish.export_record(config, kind)
    verify_manifest(source)
    is_adapter = kind == "adapter"
    names = exported_names(source, is_adapter)
    contents = adapter_contents(config, names) if is_adapter else merged_contents(config, names)
    check_contents(contents)
    publication = publish.prepare(config, kind)
    if config.dry_run:
        publish.say(publication, sorted(contents.files))
        return Path(config.output)
    inputs = {"source": file_sha256(source / MANIFEST), **publication.inputs}
    with RunFolder.open(config.output, fingerprint("export", config, inputs), config.overwrite) as run:
        if run.already_done:
            log.info("%s: already done", run.folder)
        else:
            write_contents(contents, run)
            publication.finish(run, source)
            log.info("exported %d files for %s to %s", len(contents.files), config.target, run.folder)
    publication.push(run.folder)
    return run.folder


def write_contents(contents: Contents, run: RunFolder) -> None:
    """Copy or write every file, each all or nothing. Raises DiskError."""
    for name, content in sorted(contents.files.items()):
        with run.replacing(name) as temporary:
            if isinstance(content, Path):
                shutil.copyfile(content, temporary)
            else:
                temporary.write_bytes(content)


def check_contents(contents: Contents) -> None:
    """Raises ConfigError naming the file with something that looks like a token or a home path."""
    for name, content in sorted(contents.files.items()):
        if isinstance(content, Path):
            refuse_secrets(content.parent, [content.name])
        elif Path(name).suffix in _TEXT:
            _refuse_secret(name, content.decode("utf-8"))


def exported_names(source: Path, is_adapter: bool) -> list[str]:
    """The files of the manifest that may leave, sorted. Raises VerificationError without a manifest."""
    allowed = set(_ADAPTER if is_adapter else _MERGED)
    listed = read_manifest(source)
    return sorted(n for n in listed if n in allowed or (not is_adapter and _SHARD.match(n)))


def _refuse_secret(name: str, text: str) -> None:
    secret = find_secret(text)
    if secret:
        raise ConfigError(f"{name} holds what looks like a token or a path of this machine: {secret}")
