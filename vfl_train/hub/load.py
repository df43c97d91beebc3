"""Loading an adapter or a profile without trusting it: the configuration is read before PEFT sees it, weights
are safetensors only, the base model is the one given, and the keys are compared after loading. Of a Hub repo
that carries a profile only that one JSON file is fetched, and it is checked like any other.

Threat model: the folder may come from anyone. Not covered: weights that are valid but harmful.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, HubError, VerificationError
from vfl_train.hub.fetching import fetching
from vfl_train.schemas import MAX_PROFILE_BYTES, Profile, read_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# The keys of adapter_config.json that are used. A foreign adapter that sets any other away from PEFT's
# default is refused: such keys make PEFT import modules, fetch files or change more than these weights.
_USED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "layers_pattern",
    "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision",
    "inference_mode", "init_lora_weights", "task_type", "peft_type", "peft_version",
}  # fmt: skip
# Initialisations that leave the base model as it is, so that the saved weights alone are the adapter.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
PROFILE = "profile.json"
_BLOCK = re.compile(r".*?\.\d+(?=\.)")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_KEPT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder says of itself. `modules` are full module names in the base model, taken from
    the weights."""

    folder: Path
    base_name: str | None
    revision: str | None
    modules: frozenset[str]
    config: dict[str, Any]

    def layers(self, prefix: str) -> list[int]:
        """The decoder layers that are adapted, in order; `prefix`: the name of the list of all layers."""
        inside = (m.removeprefix(f"{prefix}.") for m in self.modules if m.startswith(f"{prefix}."))
        return sorted({int(name.partition(".")[0]) for name in inside})

    @property
    def blocks(self) -> frozenset[str]:
        """Names of what is adapted layer by layer, up to the layer's number, of the decoder or of another
        part; a module outside of any layer by its own name."""
        return frozenset(m[0] if (m := _BLOCK.match(name)) else name for name in self.modules)


def check_adapter(folder: str | Path) -> AdapterInfo:
    """Read and check an adapter folder; nothing is imported, fetched or unpickled.

    Raises:
        ConfigError: no adapter there, not a plain LoRA, a key that would run or fetch something, or
            weights that are not safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no adapter folder {folder}", "give the output folder of vfl-train lora")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG} is not the configuration of a LoRA adapter")
    _refuse_keys(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder} has no {WEIGHTS}", "pickled weights (.bin) are never loaded")
    modules = frozenset(_modules_of(folder / WEIGHTS))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return AdapterInfo(folder, base, revision, modules, config)


def _refuse_keys(config: dict[str, Any], path: Path) -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        unused = key not in _USED and (key in defaults or key == "auto_mapping")
        if unused and value and value != defaults.get(key):
            raise ConfigError(f"{path} sets {key}, which vfl-train does not load", "use a plain LoRA adapter")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise ConfigError(
            f"{path} sets init_lora_weights to {init}: it changed the weights of its base as well",
            "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ConfigError(f"{path}: {key} must be a positive number")


def _modules_of(path: Path) -> set[str]:
    """Module names in the keys `base_model.model.<module>.lora_A.weight`. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            keys = list(f.keys())
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{path} is not a readable safetensors file: {e}", "copy it again") from e
    modules = set()
    for key in keys:
        module, _, tail = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if not key.startswith(PEFT_PREFIX) or tail not in ("A.weight", "B.weight"):
            raise ConfigError(f"{path} holds {key}, which is no LoRA weight of a linear module")
        modules.add(module)
    if not modules:
        raise ConfigError(f"{path} holds no weights")
    return modules


def base_of(
    adapters: list[AdapterInfo], given: str | None, option: str = "--model"
) -> tuple[str, str | None]:
    """(name, revision) of the base model: the one given, else the one all adapters name if it is on this
    machine. A name in an adapter's file alone never makes anything be fetched. Raises ConfigError, which
    tells to give the base by `option`."""
    from vfl_train.models import resolve_name

    named = {(a.base_name, a.revision) for a in adapters}
    if given is not None:
        revisions = {revision for name, revision in named if name == given}
        return given, revisions.pop() if len(revisions) == 1 else None
    if len(named) > 1:
        raise ConfigError(
            f"the adapters name different base models: {', '.join(sorted(str(n) for n, _ in named))}",
            f"give {option}",
        )
    name, revision = named.pop()
    if not name:
        raise ConfigError(f"{adapters[0].folder} names no base model", f"give {option}")
    if not resolve_name(name)[1]:
        raise ConfigError(
            f"the base model {name} is named by the adapter only and not on this machine",
            f"give it yourself to have it fetched: {option} {name}",
        )
    return name, revision


def load_adapter(
    model: torch.nn.Module, folder: str | Path, *, name: str = "default", info: AdapterInfo | None = None
) -> PeftModel:
    """Put the adapter in `folder` on `model` (a base model, or a PeftModel for a second adapter).

    Raises:
        ConfigError: see `check_adapter`.
        VerificationError: the adapter's modules or shapes and those of the model differ (a renamed
            architecture otherwise loads as the base model, with a warning at most).
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    info = info or check_adapter(folder)
    existing = dict(model.named_modules())
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    missing = sorted(m for m in info.modules if prefix + m not in existing)
    if missing:
        raise VerificationError(
            f"{info.folder} adapts {missing[0]}, which this model does not have",
            "it was trained on another model, or has older module names, which vfl-train migrate renames",
        )
    kept = {key: info.config[key] for key in _KEPT if info.config.get(key) is not None}
    # The modules come from the weights, so that no pattern decides what is adapted.
    config = LoraConfig(
        **kept, target_modules=sorted(info.modules), task_type="CAUSAL_LM", inference_mode=True
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            adapted = model
        else:
            adapted = get_peft_model(model, config, adapter_name=name)
        try:
            set_peft_model_state_dict(adapted, load_file(str(info.folder / WEIGHTS)), adapter_name=name)
        except RuntimeError as e:
            raise VerificationError(
                f"the weights in {info.folder} have other shapes than this model: {e}",
                "it was trained on a model of another size, or its r is not that of its weights",
            ) from e
    check_loaded(adapted, info, name)
    return adapted.eval()


def check_loaded(model: PeftModel, info: AdapterInfo, name: str = "default") -> None:
    """Raises VerificationError unless the tensors in the file are the ones now in the model, all of them."""
    import torch
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    stored = load_file(str(info.folder / WEIGHTS))
    found = {
        n.removeprefix(PEFT_PREFIX): m
        for n, m in model.named_modules()
        if isinstance(m, LoraLayer) and name in m.lora_A
    }
    if set(found) != info.modules:
        wrong = sorted(set(found) ^ info.modules)[0]
        raise VerificationError(f"{info.folder} and the loaded model differ in the adapted modules: {wrong}")
    for module_name, module in found.items():
        for part, holder in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            key = f"{PEFT_PREFIX}{module_name}.{part}.weight"
            weight = holder[name].weight.detach()
            if key not in stored or not torch.equal(stored[key].to(weight), weight):
                raise VerificationError(f"{key} of {info.folder} is not what was loaded")


# --- profiles ------------------------------------------------------------------------------------


def load_profile(name: str) -> Profile:
    """The profile at `name`: see `profile_file`. Raises ConfigError or HubError."""
    return Profile.load(profile_file(name))


def profile_file(name: str) -> Path:
    """Where the profile that a user named lies: a file, the profile.json of a folder, or that of a Hub repo
    (owner/name, or hub:owner/name whatever lies here; fetched into the cache, nothing else of the repo is).

    Raises:
        ConfigError: neither a path nor a repo with a profile.json at its root, no access, or too large.
        HubError: the Hub cannot be reached.
    """
    if name.startswith("hub:"):
        if not _HUB_ID.fullmatch(name[4:]):
            raise ConfigError(f"{name} names no Hub repo", "write it like hub:owner/name")
        return _fetch_profile(name[4:])
    path = Path(name)
    if path.is_dir():
        return path / PROFILE
    if path.exists() or name.endswith(".json") or not _HUB_ID.fullmatch(name):
        return path
    return _fetch_profile(name)


def _fetch_profile(repo: str) -> Path:
    from huggingface_hub import hf_hub_download

    nowhere = f"there is no file or folder {repo}, and"
    with fetching(
        missing=ConfigError(
            f"{nowhere} the Hub has no repo {repo}, or gives no access",
            "check the name; `hf auth login` for private repos",
        ),
        no_entry=ConfigError(f"{nowhere} the Hub repo {repo} has no {PROFILE} at its root"),
        unreachable=HubError(
            f"{nowhere} the Hub cannot be reached for it",
            "check the connection, or give a local profile.json",
        ),
        failed=lambda reason: HubError(f"{nowhere} {PROFILE} of that Hub repo cannot be fetched: {reason}"),
    ):
        found = hf_hub_download(repo, PROFILE, dry_run=True)  # nothing fetched: how large is it?
        if (found.file_size or 0) > MAX_PROFILE_BYTES:
            raise ConfigError(f"{PROFILE} of {repo} has {found.file_size} bytes: no profile is that large")
        return Path(hf_hub_download(repo, PROFILE))
