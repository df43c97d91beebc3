"""What differs between two runs by their fingerprints, and what of it is allowed to."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vfl_train.errors import ConfigError

log = logging.getLogger(__name__)

# Settings that say which weights are trained: a checkpoint of others cannot be gone on from.
_WEIGHTS = {
    "model", "revision", "profile", "functions", "layers", "layer_rule", "control", "also_adapt",
    "per_function", "lora_r",
}  # fmt: skip


def refuse_differences(
    place: str,
    old: Any,
    new: Mapping[str, Any],
    allowed: Collection[str] = (),
    resumable: bool = False,
) -> tuple[str, ...]:
    """The allowed keys in which the fingerprints of the run in `place` and of the wanted one differ; each is
    told as a warning. `resumable`: --allow-config-change could let the run go on. Raises ConfigError naming
    what else differs, with the old and the new value."""
    found = dict(differences(old, new))
    refused = {key: change for key, change in found.items() if key not in allowed}
    if refused:
        way_on = _way_on(refused, new) if resumable else ""
        told = [f"{key} {change}" for key, change in refused.items()]
        raise ConfigError(
            f"{place} holds another run: {'; '.join(told[:3])}",
            f"{way_on}--overwrite replaces it, or give another folder to --output",
        )
    for key, change in found.items():
        log.warning("%s: %s %s, as allowed", place, key, change)
    return tuple(found)


def _way_on(refused: Collection[str], new: Mapping[str, Any]) -> str:
    """How the run goes on with these keys changed; nothing where it cannot."""
    names = list(dict.fromkeys(key.split(".")[-1] for key in refused))
    if not set(refused) <= set(_dotted(new)) or not _WEIGHTS.isdisjoint(names):
        return ""
    return f"--allow-config-change {','.join(names)} goes on with the change, "


def allowed_keys(fingerprint: Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """Dotted keys of `fingerprint` that `names` mean: in full or by their last part, dashes as underscores.

    Raises ConfigError for a name that means none, with the nearest that does.
    """
    keys = _dotted(fingerprint)
    chosen: set[str] = set()
    for name in (name.strip().removeprefix("--").replace("-", "_") for name in names):
        found = {key for key in keys if name in (key.replace("-", "_"), key.replace("-", "_").split(".")[-1])}
        if not found:
            last = sorted({key.split(".")[-1] for key in keys})
            near = difflib.get_close_matches(name, last, n=1)
            hint = f"did you mean {near[0]}?" if near else "name a setting of the run, like learning_rate"
            raise ConfigError(f"--allow-config-change {name}: there is no such setting", hint)
        chosen |= found
    return chosen


def _dotted(value: Any, where: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [where]
    return [key for name, inner in value.items() for key in _dotted(inner, f"{where}.{name}".lstrip("."))]


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, str]]:
    """(dotted key, `was OLD, is now NEW`) for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        missing = "nothing"
        pairs = ((key, old.get(key, missing), new.get(key, missing)) for key in keys)
        return [found for key, a, b in pairs for found in differences(a, b, f"{where}.{key}".lstrip("."))]
    return [] if old == new else [(where, f"was {_short(old)}, is now {_short(new)}")]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
