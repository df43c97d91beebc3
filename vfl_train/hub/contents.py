"""What an exported folder holds, put together before anything is written: adapters and merged models made to
fit who will load them.

Names of modules are those of the base model's own files for servers, which map the names of the checkpoint
they serve (vLLM `hf_to_vllm_mapper`, SGLang `hf_to_sglang_mapper`), and today's for PEFT. Processor and chat
template are the base model's files, byte for byte.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, HubError, VerificationError
from vfl_train.hub.keys import INDEX, Names, lora_shapes, stored_names
from vfl_train.hub.load import CONFIG, PEFT_PREFIX, WEIGHTS, AdapterInfo, base_of, check_adapter
from vfl_train.hub.privacy import public_name
from vfl_train.hub.targets import (
    HERE,
    PROCESSOR,
    UNIFORM,
    Serving,
    adapter_commands,
    adapter_config,
    adapter_problems,
    check_merged,
    folded,
    is_uniform,
    merged_commands,
    processor_files,
    rewritten_weights,
    serve_page,
)
from vfl_train.runs import dumps
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    from vfl_train.config import ExportConfig
    from vfl_train.models import VisionLanguageModel

EXPORT_RECORD = "export.json"
SERVE = "serve.md"
MERGE_RECORD, KNOCKOUT_RECORD, MIGRATION_RECORD = "merge.json", "knocked_out.json", "migration.json"
log = logging.getLogger(__name__)


@dataclass
class Contents:
    """The files of an export: name -> a file to copy, or its content."""

    files: dict[str, Path | bytes] = field(default_factory=dict)

    def add_json(self, name: str, value: Any) -> None:
        """A JSON file, as every run folder writes them."""
        self.files[name] = (dumps(value, name) + "\n").encode()


@dataclass(frozen=True)
class Base:
    """The base model of an adapter without its weights, and the names of the tensors in its files."""

    name: str
    revision: str | None
    skeleton: VisionLanguageModel
    stored: frozenset[str]

    @property
    def folder(self) -> Path:
        """Where its configuration and processor lie."""
        assert self.skeleton.folder is not None
        return self.skeleton.folder


def find_base(info: AdapterInfo, given: str | None, names_needed: bool) -> Base:
    """The base of an adapter: the one given, or the one it names if it is on this machine.

    Raises:
        ConfigError: there is none, or (`names_needed`) the names of its weights cannot be had.
        HubError: the Hub cannot be reached for it.
    """
    from vfl_train.training.skeleton import load_skeleton

    name, revision = base_of([info], given, "--base")
    skeleton = load_skeleton(name, revision)
    stored = names_of(name, revision, skeleton.folder) if names_needed else frozenset()
    return Base(name, revision, skeleton, stored)


def names_of(name: str, revision: str | None, folder: Path | None) -> frozenset[str]:
    """Names of a model's tensors in its files; of a Hub model without an index only the headers of its files
    are read. Raises ConfigError or HubError."""
    assert folder is not None
    if (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
        return stored_names(folder)
    from huggingface_hub import get_safetensors_metadata

    try:
        return frozenset(get_safetensors_metadata(name, revision=revision).weight_map)
    except OSError as e:
        reason = str(e).strip().splitlines()[0]
        raise HubError(f"cannot read the names of the weights of {name}: {reason}") from e


# --- adapters --------------------------------------------------------------------------------------


def adapter_contents(config: ExportConfig, names: list[str]) -> Contents:
    """An adapter for the target of `config`; `names`: the files of its folder that may leave.

    Raises:
        ConfigError: the target cannot load it, and why; or its base is needed and not there.
        VerificationError: it does not fit its base.
    """
    info = check_adapter(config.source)
    if config.target == "gguf":  # needs no look at the base
        _refuse(config, info, adapter_problems(config.target, info.config))
    base = _base(config, info)
    current = {module: module for module in info.modules}
    vision: list[str] = []
    if base is not None:
        known = Names(base.skeleton.model)
        known.check_fit(lora_shapes(info.folder / WEIGHTS, PEFT_PREFIX), str(info.folder))
        prefix = f"{base.skeleton.decoder_name}."
        vision = sorted(m for m in info.modules if not m.startswith(prefix))
        if config.target != "peft":
            current = known.in_files(sorted(info.modules), base.stored)
    _refuse(config, info, adapter_problems(config.target, _plain(info), vision, config.allow_vision))
    contents = Contents({name: info.folder / name for name in names if name not in (WEIGHTS, CONFIG)})
    _use_processor_of(contents, base)
    rank = _add_adapter(contents, info, current, config.target)
    _add_record(contents, config, base, info, current)
    public = public_name(base.name if base else info.base_name)
    commands = adapter_commands(config.target, Serving(public, info.revision, rank, bool(vision)))
    if commands:
        contents.files[SERVE] = serve_page(config.target, commands, "vfl").encode()
    return contents


def _plain(info: AdapterInfo) -> dict[str, Any]:
    """The configuration as it will be written: modules listed, patterns folded."""
    if is_uniform(info):
        return adapter_config(
            info, sorted(info.modules), init_lora_weights=info.config.get("init_lora_weights")
        )
    largest = max([info.config["r"], *(info.config.get("rank_pattern") or {}).values()])
    return adapter_config(info, sorted(info.modules), r=largest, **UNIFORM)


def _refuse(config: ExportConfig, info: AdapterInfo, problems: list[str]) -> None:
    if not problems:
        return
    fix = "vfl-train export --target peft keeps it as it is"
    if config.target == "gguf":
        fix = (
            f"vfl-train merge {info.folder} --dtype bfloat16 --output merged, then "
            "vfl-train export merged --target gguf"
        )
    raise ConfigError(f"{config.target} cannot load {info.folder}: {problems[0]}", fix)


def _base(config: ExportConfig, info: AdapterInfo) -> Base | None:
    """The base model; None where it is not on this machine and PEFT is the target."""
    try:
        return find_base(info, config.base, names_needed=config.target != "peft")
    except ConfigError:
        if config.base is not None or config.target != "peft":
            raise
        log.warning(
            "the base model %s is not on this machine: modules and processor files are the adapter's own, "
            "not compared with it (--base gives it)", public_name(info.base_name),
        )  # fmt: skip
        return None


def _use_processor_of(contents: Contents, base: Base | None) -> None:
    """Replace the adapter's processor files by the base model's."""
    if base is None:
        return
    files = processor_files(base.folder)
    for name in PROCESSOR:
        contents.files.pop(name, None)
    contents.files |= {path.name: path for path in files}


def _add_adapter(contents: Contents, info: AdapterInfo, names: dict[str, str], target: str) -> int:
    """Weights and configuration; returns the rank. What PEFT alone loads keeps its ranks and scales."""
    changes: dict[str, Any] = {"base_model_name_or_path": public_name(info.base_name)}
    tensors, rank = None, int(info.config["r"])
    if not is_uniform(info) and target != "peft":
        tensors, rank, alpha = folded(info)
        changes |= {"r": rank, "lora_alpha": alpha, **UNIFORM}
        log.info("ranks and scales that differ by module were folded into one rank %d", rank)
    same = tensors is None and all(old == new for old, new in names.items())
    contents.files[WEIGHTS] = info.folder / WEIGHTS if same else rewritten_weights(info, names, tensors)
    contents.add_json(CONFIG, adapter_config(info, sorted(names.values()), **changes))
    return rank


def _add_record(
    contents: Contents, config: ExportConfig, base: Base | None, info: AdapterInfo, names: dict[str, str]
) -> None:
    contents.add_json(EXPORT_RECORD, {
        "target": config.target,
        "base": public_name(base.name if base else info.base_name),
        "names": "base files" if any(old != new for old, new in names.items()) else "current",
        "renamed": {new: old for old, new in names.items() if new != old},
        "allow_vision": config.allow_vision,
    })  # fmt: skip


# --- merged models ---------------------------------------------------------------------------------


def merged_contents(config: ExportConfig, names: list[str]) -> Contents:
    """A merged model for the target of `config`; `names`: the files of its folder that may leave.

    Raises:
        ConfigError: the target cannot load it, and why.
        VerificationError: its weights have other names than the base model's.
    """
    from vfl_train.models.trust import check_model_folder

    source = Path(config.source)
    check_model_folder(source)
    model = read_json(source / "config.json")
    check_merged(config.target, model, str(source / "config.json"))
    if config.base is not None:
        from vfl_train.models import local_folder

        folder = local_folder(config.base, weights=False)
        check_names(source, names_of(config.base, None, folder))
    contents = Contents({name: source / name for name in names})
    commands = merged_commands(config.target, model)
    if commands:
        asked = "" if config.target == "gguf" else HERE
        contents.files[SERVE] = serve_page(config.target, commands, asked).encode()
    contents.add_json(EXPORT_RECORD, {"target": config.target, "base": public_name(config.base)})
    return contents


def check_names(folder: Path, base: frozenset[str]) -> None:
    """Raises VerificationError unless the weights in `folder` have names that the base model's files use too,
    none besides (tied weights may be stored once)."""
    added = sorted(stored_names(folder) - base)
    if added:
        raise VerificationError(
            f"{folder} holds weights under names that the base model's files do not use: {added[0]}",
            "servers would not load it; this transformers version renames the keys of this model",
        )


def record_of(folder: Path) -> dict[str, Any]:
    """export.json of a folder, empty without one. Raises ConfigError."""
    if not (folder / EXPORT_RECORD).is_file():
        return {}
    value = read_json(folder / EXPORT_RECORD)
    if not isinstance(value, dict):
        raise ConfigError(f"{folder / EXPORT_RECORD} does not follow its contract")
    return value
