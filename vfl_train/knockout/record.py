"""`knockout.json` as code: written by `knockout`, read by `eval` and `export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vfl_train.errors import ConfigError
from vfl_train.schemas import MAX_PROFILE_BYTES, MODULES, ModelInfo, is_count, read_json

SCHEMA_VERSION = 1


def knockout_file(path: str | Path) -> Path:
    """`path`, or the knockout.json in it if it is a folder."""
    return Path(path) / "knockout.json" if Path(path).is_dir() else Path(path)


@dataclass(frozen=True)
class Knockout:
    """What eval and export need of a knockout.json. `layer`: of all rows together, None if it abstained;
    `tasks`: the layer of each task. `confirmed`, `confirmed_tasks`: whether the gain on the samples held out
    is above zero, interval and all. `data_sha256`, `shot_rows`: the file and the rows chosen on."""

    model: ModelInfo
    module: str
    layer: int | None
    tasks: dict[str, int | None]
    confirmed: bool
    confirmed_tasks: dict[str, bool]
    data_sha256: str | None
    shot_rows: frozenset[int]

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
            sure = {str(name): task.get("confirmed") is True for name, task in value["tasks"].items()}
            rows = frozenset(i for task in value["tasks"].values() for i in task.get("shot_rows", []))
            sha256 = value.get("data", {}).get("sha256")
            found = cls(
                model,
                value["module"],
                value["layer"],
                tasks,
                value.get("confirmed") is True,
                sure,
                sha256,
                rows,
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path} does not follow the knockout contract: {e}") from None
        layers = [k for k in (found.layer, *found.tasks.values()) if k is not None]
        wrong = model.wrong() or next(
            (f"layer {k!r}" for k in layers if not is_count(k) or k >= model.num_layers), ""
        )
        if wrong or found.module not in MODULES:
            raise ConfigError(f"{path} does not follow the knockout contract: {wrong or found.module}")
        return found

    def check_model(self, model: ModelInfo) -> list[str]:
        """Refuse a model of another type, depth or width (ConfigError); return warnings about another name or
        revision."""
        return self.model.check(model, "this knockout.json", "run vfl-train knockout on this model")

    def layer_of(self, task: str) -> int | None:
        """The layer to leave out for a task: its own if the file names the task, else that of all rows."""
        return self.tasks.get(task, self.layer)

    def is_confirmed(self, task: str) -> bool:
        """Whether the gain of `layer_of(task)` is confirmed on samples held out."""
        return self.confirmed_tasks.get(task, self.confirmed)

    def shots_of(self, data_sha256: str) -> frozenset[int]:
        """The rows chosen on, if these are of the data with this digest."""
        return self.shot_rows if data_sha256 == self.data_sha256 else frozenset()
