"""What is checked of a model folder before transformers reads it: nothing in it may run code or lead to
weights elsewhere.

Not covered: the weights themselves (a poisoned but valid model), and image decoders.
"""

from __future__ import annotations

from pathlib import Path

from vfl_train.errors import ConfigError
from vfl_train.schemas import read_json

# A value with a slash is a Hub repo, whose kernel transformers would fetch and run.
_IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
)  # fmt: skip


def check_model_folder(folder: Path, weights: bool = True) -> None:
    """Refuse a local model folder that names remote code or kernels, that is an adapter (transformers
    would load the base model it names, from anywhere), or (with `weights`) has pickled weights only.

    Raises ConfigError naming the file and the key.
    """
    for path in sorted(folder.glob("*config.json")):
        check_config(read_json(path), str(path))
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json)",
            "give it to --adapter, and its base to --model",
        )
    if not weights:
        return
    found = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    for path in found:
        if path.suffix == ".json":
            _check_index(folder, path)
    if not found:
        raise ConfigError(
            f"{folder} holds no safetensors weights",
            "convert pickled weights (.bin, .pt) with a tool you trust; they are never loaded here",
        )


def _check_index(folder: Path, path: Path) -> None:
    """Every shard that an index names is a safetensors file of the folder: transformers would unpickle
    any other. Raises ConfigError."""
    index = read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else []
    good = [n for n in names if isinstance(n, str) and n.endswith(".safetensors") and "/" not in n]
    if not names or len(good) < len(names) or not all((folder / n).is_file() for n in set(good)):
        raise ConfigError(
            f"{path} names weights that are no safetensors files of this folder", "copy it again"
        )


def check_config(value: object, where: str) -> None:
    """Refuse keys that make transformers import code or fetch kernels. Raises ConfigError."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "auto_map" and inner:
                raise ConfigError(
                    f"{where} names code to run (auto_map); vfl-train never runs it",
                    "use the conversion of this model that transformers supports itself, often named '-hf'",
                )
            if key in ("_attn_implementation_internal", "_experts_implementation_internal"):
                raise ConfigError(f"{where} sets {key}, which can load foreign kernels", "remove that key")
            if key in _IMPLEMENTATIONS and "/" in str(inner):
                raise ConfigError(f"{where} names a kernel of the Hub ({key})", "remove that key")
            check_config(inner, where)
    elif isinstance(value, list):
        for inner in value:
            check_config(inner, where)
