"""The parts of a vision-language model beside its decoder: vision tower and connector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vfl_train.errors import ConfigError

if TYPE_CHECKING:
    from vfl_train.models.vlm import VisionLanguageModel

PARTS = ("connector", "vision")


class Parts:
    """Where vision tower and connector of a model are, by full module name.

    `tower` is what transformers' `get_encoder` finds, or None; `connectors` are the modules between it and
    the decoder, as the family names them (Qwen keeps them inside its tower).
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.model_type, self.config = vlm.model_type, vlm.config
        self.modules = dict(vlm.base.named_modules())
        tower = vlm.base.get_encoder(modality="image")
        found = (name for name, module in self.modules.items() if module is tower)
        self.tower = None if tower in (vlm.base, vlm.base.base_model) else next(found, None)
        self.connectors = [
            name
            for name in self.modules
            if any(f".{name}".endswith(f".{known}") for known in vlm.family.connectors)
        ]

    def of(self, name: str) -> str | None:
        """`vision` or `connector` for a module inside one of them, None elsewhere."""
        if any(_inside(name, prefix) for prefix in self.connectors):
            return "connector"
        return "vision" if self.tower is not None and _inside(name, self.tower) else None

    def linears(self, part: str) -> list[str]:
        """Full names of the linear modules of `part` that LoRA may adapt: those inside the vision tower's
        blocks whose output reaches the decoder, or all of the connector.

        Raises:
            ConfigError: the model has no such part, or nothing in it is a linear module.
        """
        if part == "connector":
            names = [name for prefix in self.connectors for name in self._linears(prefix)]
        else:
            names = [name for block in self._used_blocks() for name in self._linears(block)]
        if not names:
            raise ConfigError(
                f"--also-adapt {part}: the {part} of this {self.model_type} has no linear module for LoRA",
                "leave it out",
            )
        return names

    def _used_blocks(self) -> list[str]:
        """Names of the tower's blocks up to the one that features are taken from: the others, like the
        heads of some towers, get no gradient."""
        lists = [
            (len(module), name)
            for name, module in self.modules.items()
            if isinstance(module, nn.ModuleList) and self.of(name) == "vision"
        ]
        if not lists:
            return []
        depth, name = max(lists, key=lambda entry: (entry[0], -len(entry[1])))
        taken = getattr(self.config, "vision_feature_layer", None)
        counts = [-1] if taken is None else [taken] if isinstance(taken, int) else list(taken)
        # Counted as transformers counts hidden states: 0 is the embedding, -1 the last block's output.
        used = max(k if k >= 0 else depth + 1 + k for k in counts)
        return [f"{name}.{index}" for index in range(used)]

    def _linears(self, prefix: str) -> list[str]:
        from peft.tuners.lora import LoraLayer  # an adapted linear, when a plan is made of an adapted model

        kinds = (nn.Linear, LoraLayer)
        return [n for n, module in self.modules.items() if _inside(n, prefix) and isinstance(module, kinds)]


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
