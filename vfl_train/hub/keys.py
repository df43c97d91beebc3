"""Module names of an adapter: those of today's transformers, those from before 4.52, and those of the base
model's own files.

transformers moved the parts of vision-language models in 4.52 (`model.layers` became
`model.language_model.layers`, `visual` became `model.visual`) and renames weights of models while it loads
them, by tables it keeps for each class. Adapters are PEFT's, which uses those tables for some families only:
an old adapter of a Qwen2.5-VL loads as the base model, with a warning at most (peft 0.21.2, transformers
5.23.0). The tables used here are transformers' own, so that there is nothing to keep up to date.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, VerificationError
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class Names:
    """Renames modules of `model` (meta tensors will do) between today's names and those before 4.52, which
    are also those of most base models' files."""

    def __init__(self, model: torch.nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        tables = get_model_conversion_mapping(model, add_legacy=False)
        # Converters split and join tensors of experts, which no adapter of ours touches.
        self._forward: list[Any] = [table for table in tables if isinstance(table, WeightRenaming)]
        self._backward: list[Any] = [table.reverse_transform() for table in reversed(self._forward)]
        self._modules = dict(model.named_modules())

    def knows(self, module: str) -> bool:
        """Whether the model has a module of this name."""
        return module in self._modules

    def current(self, module: str) -> str:
        """Today's name of a module; one that the model has is left as it is."""
        return module if self.knows(module) else _renamed(module, self._forward)

    def legacy(self, module: str) -> str:
        """The name before 4.52 of a module that has one of today's names."""
        return _renamed(module, self._backward)

    def in_files(self, modules: Iterable[str], stored: frozenset[str]) -> dict[str, str]:
        """Today's name -> the name under which the base model's files (`stored`: the names of their tensors)
        hold the module. Raises ConfigError naming a module that they do not hold."""
        found = {}
        for module in modules:
            names = [name for name in (self.legacy(module), module) if f"{name}.weight" in stored]
            if not names:
                raise ConfigError(
                    f"the files of the base model hold no weight of {module}",
                    "give the base that the adapter was trained on: --base",
                )
            found[module] = names[0]
        return found

    def check_fit(self, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], what: str) -> None:
        """`shapes`: module -> shapes of its A [r, in] and B [out, r]. Raises VerificationError naming the
        first module that the model does not have or has in another size."""
        for module, (a, b) in sorted(shapes.items()):
            linear = self._modules.get(module)
            if linear is None:
                raise VerificationError(
                    f"{what} adapts {module}, which the base model does not have",
                    "vfl-train migrate renames older adapters; else it is of another base",
                )
            sizes = (getattr(linear, "in_features", None), getattr(linear, "out_features", None))
            if (a[1], b[0]) != sizes:
                raise VerificationError(
                    f"{what} does not fit the base model: {module} maps {sizes[0]} to {sizes[1]} there, "
                    f"{a[1]} to {b[0]} in the adapter",
                    "give the base that the adapter was trained on",
                )


def _renamed(module: str, tables: list[Any]) -> str:
    name = f"{module}.weight"  # the tables are made for weights
    for table in tables:
        name, _ = table.rename_source_key(name)
    return name.removesuffix(".weight")


def lora_shapes(path: Path, prefix: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Module -> shapes of A and B of an adapter's safetensors file, without reading the weights. Raises
    ConfigError where one of the two is missing or their ranks differ."""
    from safetensors import safe_open

    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with safe_open(str(path), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            module, _, part = key.removeprefix(prefix).rpartition(".lora_")
            shapes.setdefault(module, {})[part[:1]] = tuple(file.get_slice(key).get_shape())
    for module, pair in shapes.items():
        if set(pair) != {"A", "B"} or len(pair["A"]) != 2 or pair["A"][0] != pair["B"][-1]:
            raise ConfigError(f"{path}: lora_A and lora_B of {module} do not belong together")
    return {module: (pair["A"], pair["B"]) for module, pair in shapes.items()}


def stored_names(folder: Path) -> frozenset[str]:
    """Names of all tensors in the safetensors files of a model folder: from the index where there is one,
    which needs no weights. Raises ConfigError."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict):
            raise ConfigError(f"{folder / INDEX} names no weights", "copy it again")
        return frozenset(names)
    names = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            names.update(file.keys())
    if not names:
        raise ConfigError(f"{folder} holds no safetensors weights", "the base model's names are needed")
    return frozenset(names)
