"""Did training move the layers? The profile of an adapter beside the one its training started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vfl_train.models import VisionLanguageModel
from vfl_train.schemas import FunctionProfile, Profile


def base_profile(adapter: str | None) -> Path | None:
    """The base's profile.json in an adapter folder, if it holds one (`vfl-train lora` puts it there)."""
    path = Path(adapter) / "profile.json" if adapter else None
    return path if path is not None and path.is_file() else None


def load_base(path: Path, vlm: VisionLanguageModel, intervention: str, phase: str) -> Profile | None:
    """The base's profile, None (and a line that says so) if it was measured in another way. Raises
    ConfigError if it is of a model of another kind."""
    base = Profile.load(path)
    for warning in base.check_model(vlm.info):
        print(f"warning: {path}: {warning}")
    if (base.intervention, base.phase) != (intervention, phase):
        print(f"not compared with {path}: it was measured with {base.intervention}, phase {base.phase}")
        return None
    return base


def compare(base: Profile, functions: dict[str, FunctionProfile]) -> dict[str, dict[str, Any]]:
    """Per function that both profiles have: the base's peak layer and flip block, and the largest difference
    of the change rates at any layer (None unless the function was measurable in both)."""
    return {
        name: {
            "peak_layer": base.functions[name].peak_layer, "flip_block": base.functions[name].flip_block,
            "largest_change": _largest(base.functions[name], f),
        }
        for name, f in functions.items()
        if name in base.functions
    }  # fmt: skip


def _largest(before: FunctionProfile, after: FunctionProfile) -> float | None:
    if (before.status, after.status) != ("ok", "ok"):
        return None
    changes = zip(before.change_rate, after.change_rate, strict=True)
    return max((abs(a - b) for a, b in changes), default=None)
