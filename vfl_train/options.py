"""What one setting of a command is: its type, help text and conversion, said once for every source.

A command's settings are the fields of a frozen dataclass (vfl_train/config/). The same field makes the
command-line option and the recipe key, and the same `coerce` converts what either of them holds, so a flag
and a YAML value cannot mean different things.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from vfl_train.errors import ConfigError

C = TypeVar("C", bound="Config")
Form = Literal["plain", "list", "weights"]  # how a text field may be written in YAML
Group = Literal["command", "model", "training"]  # the heading it stands under in --help

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_FITTING: dict[type, tuple[type, ...]] = {
    int: (int, str),
    float: (int, float, str),
    bool: (bool,),
    str: (str, int, float),
    Path: (str, Path),
}
_LIST_WANTED = {int: "a list of whole numbers", str: "a list of names"}


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    argument: bool = False,
    form: Form = "plain",
    group: Group = "command",
    shared: bool = True,
    excludes: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also an option of the command line and a key of a recipe.

    Without `default` it is required. `argument`: given by position, not by --name. `form`: whether YAML may
    hold a list or a mapping for this text. `shared`: may it stand at the top of a recipe, for all commands?
    `excludes`: options that cannot be set together with this one; the one set nearer to the user stays
    (flag over section over shared key).
    """
    metadata = {
        "help": help, "choices": choices, "metavar": metavar, "argument": argument,
        "form": form, "group": group, "shared": shared, "excludes": excludes,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Spec:
    """One setting as `option` and the field's type say it. `kind` is the plain type of a value, or of an
    item where `many`; `optional` allows None."""

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    metavar: str
    argument: bool
    form: Form
    group: Group
    shared: bool
    excludes: tuple[str, ...]

    @property
    def required(self) -> bool:
        """Has no default."""
        return self.default is MISSING

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return self.metavar if self.argument else "--" + self.name.replace("_", "-")


def _kind_of(hint: Any) -> tuple[type, bool, bool]:
    """(plain type, many, optional) of a field's type: `X`, `X | None` or `tuple[X, ...]`."""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    many = get_origin(hint) is tuple
    return (get_args(hint)[0] if many else hint), many, optional


_SPECS: dict[type[Config], dict[str, Spec]] = {}  # what `specs` has worked out


def specs(config_class: type[Config]) -> dict[str, Spec]:
    """The settings of `config_class` by name, in the order of its fields."""
    if config_class not in _SPECS:
        hints = get_type_hints(config_class)
        _SPECS[config_class] = {
            f.name: Spec(f.name, *_kind_of(hints[f.name]), default=f.default, **f.metadata)
            for f in fields(config_class)
        }
    return _SPECS[config_class]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all command settings. Every value passes `coerce` whoever builds it, then `check`.

    Raises ConfigError for a value of the wrong type, outside its choices, or that contradicts another.
    """

    def __post_init__(self) -> None:
        for spec in specs(type(self)).values():
            object.__setattr__(self, spec.name, coerce(spec, getattr(self, spec.name), spec.flag))
        self.check()

    def check(self) -> None:
        """Rules between fields. Raises ConfigError."""

    @classmethod
    def bind(cls, values: Mapping[str, Any]) -> Self:
        """Build from `values` by key. Raises ConfigError for an unknown key (with the nearest known one)
        and for a required one that is missing."""
        known = specs(cls)
        for key in values:
            if key not in known:
                raise unknown_key(key, known, "option")
        for spec in known.values():
            if spec.required and values.get(spec.name) is None:
                raise ConfigError(f"{spec.flag} is missing", spec.help)
        return cls(**values)


def unknown_key(key: object, known: Iterable[str], what: str, hint: str = "") -> ConfigError:
    """The error for a key nobody reads, with a did-you-mean where one is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    fix = hint or (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    return ConfigError(f"unknown {what} {key!r}", fix)


# --- conversion ----------------------------------------------------------------------------------


def coerce(spec: Spec, value: Any, where: str) -> Any:
    """`value` (text of the command line, a YAML value, or already right) as the field's type.

    `where` names the place in the message. Raises ConfigError.
    """
    if value is None:
        if spec.optional:
            return None
        raise ConfigError(f"{where} is empty", f"it must be {_wanted(spec)}")
    if spec.many:
        return tuple(_choose(spec, _scalar(spec, item, where), where) for item in _items(value))
    if spec.form != "plain" and not isinstance(value, str):
        value = _joined(value)
    return _choose(spec, _scalar(spec, value, where), where)


def _items(value: Any) -> list[Any]:
    """Items of a list, or of text with commas between them; empty items are dropped."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _joined(value: Any) -> Any:
    """YAML's list or mapping in the form of the command line: `20,21` or `ocr=0.5,count=0.5`."""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return ",".join(str(item) for item in value) if isinstance(value, list | tuple) else value


def _scalar(spec: Spec, value: Any, where: str) -> Any:
    try:
        result = _converted(spec.kind, value)
    except ValueError:
        # A container is named by its type alone: its text could be of any size.
        shown = type(value).__name__ if isinstance(value, dict | list | tuple) else repr(value)
        raise ConfigError(f"{where} must be {_wanted(spec)}, not {shown}") from None
    return result


def _converted(kind: type, value: Any) -> Any:
    """`value` as a `kind`. Raises ValueError for what does not fit: a truth value is no number and no text, a
    fraction no whole number, NaN no number, NUL no part of a text."""
    fitting = _FITTING[kind]
    if not isinstance(value, fitting) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    result = kind(value)
    if (kind is float and not math.isfinite(result)) or "\0" in str(result):
        raise ValueError
    return result.expanduser() if isinstance(result, Path) else result


def _choose(spec: Spec, value: Any, where: str) -> Any:
    if spec.choices and value not in spec.choices:
        near = difflib.get_close_matches(str(value), spec.choices, n=1)
        fix = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(spec.choices)}, not {value!r}", fix)
    return value


def _wanted(spec: Spec) -> str:
    return _LIST_WANTED[spec.kind] if spec.many else _WANTED[spec.kind]


# --- little languages of single options ------------------------------------------------------------


def parse_layers(text: str) -> tuple[int, ...]:
    """Sorted 0-based layer indices of `20-23,25` (ranges are inclusive). Raises ConfigError."""
    layers: set[int] = set()
    for part in _items(text):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not (first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit()))):
            raise ConfigError(f"layers: {part!r} is not a layer or a range", "write them like 20-23,25")
        start, end = int(first), int(last or first)
        if end < start or end > 9999:
            raise ConfigError(f"layers: {part!r} is not a rising range of decoder layers")
        layers.update(range(start, end + 1))
    if not layers:
        raise ConfigError("layers is empty", "write them like 20-23,25")
    return tuple(sorted(layers))


def format_layers(layers: Iterable[int]) -> str:
    """Layers as `parse_layers` reads them: [7, 2, 3, 4] -> "2-4,7"; "-" for none."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "-"


def parse_weights(text: str, option_name: str) -> dict[str, float]:
    """Function name -> non-negative number of `ocr=0.5,count=0.5`. Raises ConfigError."""
    weights: dict[str, float] = {}
    for part in _items(text):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"{option_name}: {part!r} is not NAME=NUMBER", "write it like ocr=0.5,count=0.5"
            )
        if name in weights:
            raise ConfigError(f"{option_name} names {name!r} twice")
        weights[name] = value
    if not weights:
        raise ConfigError(f"{option_name} is empty", "write it like ocr=0.5,count=0.5")
    return weights


def budget_rows(budget: str, kept: int, option_name: str = "--budget") -> int:
    """Rows that `budget` allows of `kept` rows: a share below 1 (rounded down, at least 1) or a row count.

    Computed on exact fractions: 0.29 of 100 rows is 29, which floating point would round down to 28.
    Raises ConfigError.
    """
    if budget.isascii() and budget.isdigit() and int(budget) >= 1:
        return int(budget)
    try:
        share = Fraction(budget)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise ConfigError(
            f"{option_name} must be a share between 0 and 1 or a number of rows, not {budget!r}",
            "0.2 takes a fifth of the rows, 500 takes five hundred",
        )
    return max(1, math.floor(share * kept))
