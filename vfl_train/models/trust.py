"""What is checked of a model folder before transformers reads it: nothing in it may run code.

Not covered: the weights themselves (a poisoned but valid model), and image decoders.
"""

from __future__ import annotations

from pathlib import Path

from vfl_train.errors import ConfigError
from vfl_train.schemas import read_json


def check_model_folder(folder: Path) -> None:
    """Refuse a local model folder that names remote code or kernels, or that has pickled weights only.

    Raises ConfigError naming the file and the key.
    """
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            check_config(read_json(folder / name), str(folder / name))
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    if not weights:
        raise ConfigError(
            f"{folder} holds no safetensors weights",
            "convert pickled weights (.bin, .pt) with a tool you trust; they are never loaded here",
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
            check_config(inner, where)
    elif isinstance(value, list):
        for inner in value:
            check_config(inner, where)
