"""`knockout.json` as code: written by `knockout`, read by `eval` and `export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfl_train.errors import ConfigError
from vfl_train.schemas import MAX_PROFILE_BYTES, MODULES, ModelInfo, read_json

SCHEMA_VERSION = 1


def knockout_file(path: str | Path) -> Path:
    """`path`, or the knockout.json in it if it is a folder."""
    return Path(path) / "knockout.json" if Path(path).is_dir() else Path(path)


@dataclass(frozen=True)
class Knockout:
    """What eval and export need of a knockout.json. `layer`: of all rows together, None if it abstained;
    `tasks`: the layer of each task."""

    model: ModelInfo
    module: str
    layer: int | None
    tasks: dict[str, int | None]

    @classmethod
    def load(cls, path: str | Path) -> Knockout:
        """Read `path` (a file, or a folder with knockout.json in it). Raises ConfigError."""
        path = knockout_file(path)
        if path.is_file() and path.stat().st_size > MAX_PROFILE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes: no knockout.json is that large")
        value = read_json(path)
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{path} is not a knockout.json of schema version {SCHEMA_VERSION}")
        try:
            model = ModelInfo(**value["model"])
            tasks = {str(name): task["layer"] for name, task in value["tasks"].items()}
            found = cls(model, value["module"], value["layer"], tasks)
        except (KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path} does not follow the knockout contract: {e}") from None
        layers = [found.layer, *found.tasks.values()]
        wrong = [k for k in layers if k is not None and not _is_layer(k, model.num_layers)]
        if wrong or found.module not in MODULES:
            raise ConfigError(f"{path} does not follow the knockout contract: {wrong or found.module}")
        return found

    def check_model(self, model: ModelInfo) -> None:
        """Refuse a model of another type, depth or width (ConfigError)."""
        for key in ("model_type", "num_layers", "hidden_size"):
            ours, theirs = getattr(self.model, key), getattr(model, key)
            if ours != theirs:
                raise ConfigError(
                    f"this knockout.json is of a model with {key} {ours}, the model has {theirs}",
                    "run vfl-train knockout on this model",
                )

    def layer_of(self, task: str) -> int | None:
        """The layer to leave out for a task: its own if the file names the task, else that of all rows."""
        return self.tasks.get(task, self.layer)


def _is_layer(value: Any, depth: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < depth
