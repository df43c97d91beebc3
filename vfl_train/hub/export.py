"""Copying a finished folder to one that can be published: by allow-list, checked for secrets."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vfl_train.errors import ConfigError
from vfl_train.hub.load import CONFIG, WEIGHTS, check_adapter
from vfl_train.hub.manifest import read_manifest, verify_manifest
from vfl_train.hub.privacy import find_secret, public_name
from vfl_train.runs import MANIFEST, RunFolder, file_sha256, fingerprint

if TYPE_CHECKING:
    from vfl_train.config import ExportConfig

_PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
LICENCES = ("LICENSE", "NOTICE")  # go where the weights go
_COMMON = (*_PROCESSOR, "README.md", "logits_reference.json", *LICENCES)
_ADAPTER = (
    *_COMMON, WEIGHTS, CONFIG, "profile.json", "plan.json", "selection.json", "train_config.yaml",
)  # fmt: skip
_MERGED = (
    *_COMMON, "config.json", "generation_config.json", "model.safetensors.index.json", "merge.json",
    "knocked_out.json",
)  # fmt: skip
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors\Z")
log = logging.getLogger(__name__)
_TEXT = (".json", ".md", ".yaml", ".jinja", ".txt")


def export(config: ExportConfig) -> Path:
    """Copy the adapter or merged model of `config` for plain PEFT or transformers; with --knockout, write the
    model without the layer that the file leaves out.

    Returns:
        The output folder, with a manifest of its own.

    Raises:
        ConfigError: a target or option that is not there yet, no such folder, or a token or home path in
            a file (naming the file).
        VerificationError: a file was changed since it was written.
    """
    _refuse_unbuilt(config)
    if config.knockout is not None:
        from vfl_train.hub.knockout import export_knockout

        return export_knockout(config)
    source = Path(config.source)
    if not source.is_dir():
        raise ConfigError(f"there is no folder {source}", "give the output of lora or merge")
    verify_manifest(source)
    is_adapter = (source / CONFIG).is_file()
    if is_adapter:
        check_adapter(source)
    names = exported_names(source, is_adapter)
    check_secrets(source, names)
    wanted = fingerprint("export", config, {"source": file_sha256(source / MANIFEST)})
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if run.already_done:
            log.info("%s: already done", run.folder)
            return run.folder
        for name in names:
            if name == CONFIG:
                run.write_text(name, _public_adapter_config(source / CONFIG))
            else:
                with run.replacing(name) as temporary:
                    shutil.copyfile(source / name, temporary)
    log.info("exported %d files to %s", len(names), run.folder)
    return run.folder


def _refuse_unbuilt(config: ExportConfig) -> None:
    if config.target != "peft":
        raise ConfigError(f"--target {config.target} is not available yet", "use --target peft")
    if config.push_to_hub is not None:
        raise ConfigError("--push-to-hub is not available yet", "upload the folder with `hf upload`")


def exported_names(source: Path, is_adapter: bool) -> list[str]:
    """The files of the manifest that may leave, sorted. Raises VerificationError without a manifest."""
    allowed = set(_ADAPTER if is_adapter else _MERGED)
    listed = read_manifest(source)
    return sorted(n for n in listed if n in allowed or (not is_adapter and _SHARD.match(n)))


def check_secrets(source: Path, names: list[str]) -> None:
    """Raises ConfigError naming the file with something that looks like a token or a home path."""
    for name in names:
        path = source / name
        # the base's path in the adapter configuration is cut on the way out; vocabularies are not prose
        if path.suffix not in _TEXT or name in (CONFIG, "tokenizer.json", "vocab.json", "merges.txt"):
            continue
        secret = find_secret(path.read_text(encoding="utf-8"))
        if secret:
            raise ConfigError(f"{name} holds what looks like a token or a path of this machine: {secret}")


def _public_adapter_config(path: Path) -> str:
    value = json.loads(path.read_text(encoding="utf-8"))
    base = value.get("base_model_name_or_path")
    value["base_model_name_or_path"] = public_name(base)
    if value["base_model_name_or_path"] != base:
        log.warning(
            "the base model is a folder of this machine; the export names it %s only",
            value["base_model_name_or_path"],
        )
    return json.dumps(value, indent=2) + "\n"
