"""Recipes: YAML defaults for the options of every command, in one file of a project.

    project: my-run            # commands write below it: my-run/profile, my-run/select, ...
    model: Qwen/Qwen2.5-VL-7B-Instruct
    functions: [ocr, count]
    select:                    # a section a command; its keys are the command's options
      budget: 0.2

A key at the top is shared by all commands that have this option, a mapping at the top is a section. The
nearer word counts: flag over section over shared key over the option's default. A recipe is data: it cannot
name code, and a key that no command reads is an error. Relative paths are relative to where the command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vfl_train.config import COMMANDS
from vfl_train.errors import ConfigError
from vfl_train.options import C, Config, coerce, specs, unknown_key

PROJECT_FILE = "vfl-train.yaml"
_LARGEST_RECIPE = 1 << 20  # bytes; a longer file is not a recipe


class _RecipeLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key given twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _shared_keys() -> set[str]:
    every = (spec for config in COMMANDS.values() for spec in specs(config).values())
    return {spec.name for spec in every if spec.shared and not spec.argument}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `name` is what messages call it, None when there is no recipe at all; `project` is
    the folder that commands write below."""

    name: str | None = None
    project: Path = Path()
    shared: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def find(cls, given: str | None) -> Recipe:
        """The recipe `given`, else ./vfl-train.yaml if there, else one that sets nothing.

        Raises ConfigError, as `load`.
        """
        if given is not None:
            return cls.load(given)
        return cls.load(PROJECT_FILE) if Path(PROJECT_FILE).is_file() else cls()

    @classmethod
    def load(cls, given: str | Path) -> Recipe:
        """Read and check a recipe file, or a bundled recipe by its name (`quickstart`).

        Raises ConfigError naming the file and the key: missing, not YAML, unknown key, wrong type.
        """
        name, text = _read(str(given))
        content = _parse(name, text)
        project = content.pop("project", ".")
        if not isinstance(project, str):
            raise ConfigError(f"{name}: project must be a folder, not {type(project).__name__}")
        sections = {k: v or {} for k, v in content.items() if k in COMMANDS and isinstance(v, dict | None)}
        shared = {k: v for k, v in content.items() if k not in sections}
        recipe = cls(name, Path(project).expanduser(), shared, sections)
        recipe._check()
        return recipe

    def _check(self) -> None:
        known = _shared_keys()
        for key in self.shared:
            if key not in known:
                raise _unknown(f"{self.name}: ", key, {*known, *COMMANDS, "project"}, "key")
        for command, section in self.sections.items():
            for key in section:
                if key not in specs(COMMANDS[command]):
                    raise _unknown(f"{self.name}: ", key, set(specs(COMMANDS[command])), f"key of {command}")
        for command in COMMANDS:
            self._values(command)  # a wrong value is found at once, not when its command runs

    def _values(self, command: str) -> dict[str, Any]:
        """What the recipe says for `command`: shared keys that it has, then its section."""
        known = specs(COMMANDS[command])
        section = self.sections.get(command, {})
        shared = {
            key: coerce(known[key], value, f"{self.name}: {key}")
            for key, value in self.shared.items()
            if key in known and known[key].shared
        }
        near = {k: coerce(known[k], v, f"{self.name}: {command}.{k}") for k, v in section.items()}
        return _override(COMMANDS[command], shared, near)

    def config(self, config_class: type[C], flags: Mapping[str, Any] | None = None) -> C:
        """Settings of a command: `flags` over the recipe over the options' defaults.

        In a project, `output` is `<project>/<command>` and `profile` is the profile.json that
        `vfl-train profile` writes there, unless something says otherwise.

        Raises ConfigError: unknown or missing setting, wrong value, settings that contradict each other.
        """
        command = next(name for name, known in COMMANDS.items() if known is config_class)
        values = _override(config_class, self._values(command), flags or {})
        known = specs(config_class)
        if self.name is not None and "output" in known:
            values.setdefault("output", self.project / command)
        if "profile" in known and known["profile"].shared and "layers" not in values:
            values.setdefault("profile", self._default_profile())
        return config_class.bind(values)

    def _default_profile(self) -> str | None:
        folder = self.sections.get("profile", {}).get("output", self.project / "profile")
        path = Path(folder).expanduser() / "profile.json"
        return str(path) if self.name is not None or path.is_file() else None


def _parse(name: str, text: str) -> dict[Any, Any]:
    """The mapping that `text` holds. Raises ConfigError: no YAML, a tag that builds an object, no mapping."""
    try:
        content = _RecipeLoader(text).get_single_data()
    except yaml.MarkedYAMLError as e:
        line = f" at line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{name} is not a recipe: {e.problem or e.context}{line}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{name} is not a recipe: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must hold keys with values", "like model: phantom")
    return content


def _override(config_class: type[Config], far: Mapping[str, Any], near: Mapping[str, Any]) -> dict[str, Any]:
    """`near` over `far`; an option set near takes those away that it excludes and that were set far."""
    known = specs(config_class)
    gone = {other for key in near if key in known for other in known[key].excludes}
    return {**{key: value for key, value in far.items() if key not in gone}, **near}


def _unknown(prefix: str, key: object, known: set[str], what: str) -> ConfigError:
    owners = [name for name, config in COMMANDS.items() if key in specs(config)]
    hint = f"it is an option of {', '.join(owners)}: put it into that section" if owners else ""
    error = unknown_key(key, known, what, hint)
    return ConfigError(prefix + error.message, error.fix)


def _read(given: str) -> tuple[str, str]:
    """(name for messages, text) of a recipe file or a bundled recipe."""
    path = Path(given).expanduser()
    try:
        if not path.exists() and given in bundled():
            return f"recipe {given}", files("vfl_train.recipes").joinpath(f"{given}.yaml").read_text("utf-8")
        if path.stat().st_size > _LARGEST_RECIPE:
            raise ConfigError(f"{given} is larger than 1 MiB", "is it a recipe?")
        return given, path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        known = ", ".join(bundled())
        raise ConfigError(f"there is no recipe file {given}", f"bundled recipes: {known}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{given} is not a UTF-8 text file", "is it a recipe?") from None


def bundled() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("vfl_train.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
