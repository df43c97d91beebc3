"""Models: one class around any vision-language model that transformers loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfl_train.models.vlm import VisionLanguageModel, load_processor, local_folder, resolve_name

__all__ = ["VisionLanguageModel", "load_processor", "local_folder", "resolve_name"]


def __getattr__(name: str) -> Any:  # keeps torch out of `import vfl_train.models.families`
    if name in __all__:
        from vfl_train.models import vlm

        return getattr(vlm, name)
    raise AttributeError(name)
