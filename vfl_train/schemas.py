"""The file contracts as code: what one command writes and another (or another program) reads.

Layers are 0-based. Rates are shares in 0..1, intervals 95 %, losses nats per answer token.
A file that does not follow its contract raises ConfigError naming the file and the key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from vfl_train.errors import ConfigError, DataError

SCHEMA_VERSION = 1
BUILTIN_FUNCTIONS = ("recognition", "emotion", "count", "grounding", "relation", "ocr")
FUNCTION_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
BY_LAYER = "loss_by_layer"  # column of scores.parquet: losses without each single layer
LANGUAGE = "language"  # the bucket of rows that do not need the image; never a function's name
INTERVENTIONS = ("swap", "drop", "drop-from")
PHASES = ("text", "decode")
PATHS = ("engine", "reference")
MODULES = ("attention", "mlp", "both")  # what of a layer a knockout leaves out
RERUN_AT = ("end", "itself")  # when layers run again
PROFILE_CONTROLS = ("self", "nuisance", "unrelated", "noise")  # swaps that show what a swap does by itself
MATCHES = ("exact", "choice", "iou")
STATUSES = ("ok", "not_measurable")
LAYER_RULES = ("block", "paper")
MIN_ANSWERED_PAIRS = 20
MAX_PROFILE_BYTES = 16 * 2**20  # a real one has some hundred KB


def check_function_name(name: str) -> str:
    """`name` if it may name a vision function. Raises ConfigError."""
    if not isinstance(name, str) or not FUNCTION_NAME.match(name) or name == LANGUAGE:
        raise ConfigError(
            f"{name!r} is not a function name", "use lower-case letters, digits and _, not 'language'"
        )
    return name


def read_json(path: Path) -> Any:
    """Parsed JSON file. Raises ConfigError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", "check the path") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid JSON: nested too deep") from None
    except ValueError as e:  # no UTF-8, no JSON, or a number of more digits than Python converts
        raise ConfigError(f"{path} is not valid JSON: {e}") from None


# --- probe sets --------------------------------------------------------------------------------


IMAGE_KEYS = ("image_a", "image_b")


@dataclass(frozen=True)
class ProbePair:
    """One line of `pairs.jsonl`: two images, one question, the right answer for each image.
    `image_a`, `image_b` are paths inside the probe folder, or of videos the list of their frames' paths."""

    function: str
    image_a: str | tuple[str, ...]
    image_b: str | tuple[str, ...]
    question: str
    answer_a: str
    answer_b: str
    match: str = "exact"

    @classmethod
    def from_json(cls, value: object) -> ProbePair:
        """Check one parsed line. Raises DataError naming the key."""
        if not isinstance(value, dict):
            raise DataError("a pair must be a JSON object")
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: v for k, v in value.items() if k in known}
        for key in known - {"match"}:
            frames = given.get(key) if key in IMAGE_KEYS else None
            texts = frames if isinstance(frames, list) and frames else [given.get(key)]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise DataError(f"key {key!r} is missing, empty or not a string")
        given |= {k: tuple(v) for k, v in given.items() if isinstance(v, list)}
        pair = cls(**given)
        if not FUNCTION_NAME.match(pair.function) or pair.function == LANGUAGE:
            raise DataError(f"{pair.function!r} is not a function name")
        if pair.match not in MATCHES:
            raise DataError(f"match must be one of {', '.join(MATCHES)}, not {pair.match!r}")
        return pair


# --- profile.json ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """Which model a file speaks of."""

    name_or_path: str
    revision: str | None
    model_type: str
    num_layers: int
    hidden_size: int

    def wrong(self) -> str:
        """What of these is of another type than it says, empty if nothing is."""
        if not (is_count(self.num_layers) and self.num_layers and is_count(self.hidden_size)):
            return "model.num_layers and model.hidden_size must be whole numbers"
        if not all(isinstance(t, str) for t in (self.name_or_path, self.model_type, self.revision or "")):
            return "model.name_or_path, model.model_type and model.revision must be text"
        return ""

    def check(self, model: ModelInfo, what: str, fix: str) -> list[str]:
        """Refuse a `model` of another type, depth or width than this one (ConfigError); return warnings about
        another name or revision. `what` speaks of this model, like "this profile"; `fix` says what to do."""
        for key in ("model_type", "num_layers", "hidden_size"):
            ours, theirs = getattr(self, key), getattr(model, key)
            if ours != theirs:
                raise ConfigError(f"{what} is of a model with {key} {ours}, the model has {theirs}", fix)
        return [
            f"{what} is of {key} {getattr(self, key)!r}, the model is {getattr(model, key)!r}"
            for key in ("name_or_path", "revision")
            if getattr(self, key) != getattr(model, key)
        ]


@dataclass(frozen=True)
class FunctionProfile:
    """What a profile says of one function. `change_rate`, `flip_rate`, `ci95` and every control have one
    entry a layer; a control that could not be measured is an empty list."""

    status: str
    pairs: int
    pairs_answered: int
    change_rate: list[float]
    flip_rate: list[float]
    ci95: list[list[float]]
    controls: dict[str, list[float]]
    peak_layer: int | None
    layers: list[int]
    flip_block: list[int]
    distributed: bool
    details: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def wrong(self, depth: int) -> str:
        """What does not follow the contract in a model of `depth` layers, empty if all does."""
        if self.status not in STATUSES:
            return f"status must be one of {', '.join(STATUSES)}"
        if not (is_count(self.pairs) and is_count(self.pairs_answered)):
            return "pairs and pairs_answered must be whole numbers"
        examples = self.examples if isinstance(self.examples, list) else [None]
        if not all(isinstance(v, dict) for v in (self.controls, self.details, *examples)):
            return "controls, details and every one of the examples must be objects"
        rates = {"change_rate": self.change_rate, "flip_rate": self.flip_rate}
        for key, values in (rates | {f"controls.{c}": r for c, r in self.controls.items()}).items():
            if not _are_shares(values) or len(values) not in (0, depth):
                return f"{key} must be {depth} numbers from 0 to 1, or none"
        intervals = self.ci95 if isinstance(self.ci95, list) else [None]
        if len(intervals) not in (0, depth) or any(not _are_shares(i) or len(i) != 2 for i in intervals):
            return f"ci95 must be {depth} pairs of numbers from 0 to 1, or none"
        peak = [] if self.peak_layer is None else [self.peak_layer]
        for key, layers in (("peak_layer", peak), ("layers", self.layers), ("flip_block", self.flip_block)):
            if not isinstance(layers, list) or any(not is_count(k) or k >= depth for k in layers):
                return f"{key} names a layer outside 0-{depth - 1}"
        return ""


@dataclass(frozen=True)
class Profile:
    """`profile.json` (design, section 4)."""

    model: ModelInfo
    intervention: str
    phase: str
    path: str
    dtype: str
    seed: int
    versions: dict[str, str]
    probe_set: dict[str, str]
    functions: dict[str, FunctionProfile]
    drop_curve: dict[str, Any] = field(default_factory=dict)
    drop_plan: dict[str, Any] = field(default_factory=dict)
    interaction: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    compared_with: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The file's content, `schema_version` first."""
        return {"schema_version": self.schema_version, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read `path` (a file, or a folder with profile.json in it). It may come from anyone: data only, and
        every key that is read is checked. Raises ConfigError."""
        path = Path(path)
        path = path / "profile.json" if path.is_dir() else path
        if path.is_file() and path.stat().st_size > MAX_PROFILE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes: no profile is that large")
        value = read_json(path)
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{path} is not a profile of schema version {SCHEMA_VERSION}", "profile again")
        try:
            model = ModelInfo(**value["model"])
            functions = {
                check_function_name(name): _function_profile(f) for name, f in value["functions"].items()
            }
            known = {f.name for f in fields(cls)} - {"model", "functions"}
            profile = cls(model=model, functions=functions, **{k: v for k, v in value.items() if k in known})
        except (KeyError, TypeError, AttributeError, ConfigError) as e:
            raise ConfigError(f"{path} does not follow the profile contract: {e}") from None
        wrong = profile._wrong()
        if wrong:
            raise ConfigError(f"{path} does not follow the profile contract: {wrong}")
        return profile

    def _wrong(self) -> str:
        """What does not follow the contract, empty if all does."""
        for key, kind in get_type_hints(Profile).items():
            value, plain = getattr(self, key), get_origin(kind) or kind
            if not isinstance(value, plain) or isinstance(value, bool):
                return f"{key} must be {'an object' if plain is dict else f'of type {plain.__name__}'}"
        for key, known in (("intervention", INTERVENTIONS), ("phase", PHASES), ("path", PATHS)):
            if getattr(self, key) not in known:
                return f"{key} must be one of {', '.join(known)}"
        if wrong := self.model.wrong():
            return wrong
        of_functions = (f.wrong(self.model.num_layers) for f in self.functions.values())
        return next(
            (f"functions.{n}.{w}" for n, w in zip(self.functions, of_functions, strict=True) if w), ""
        )

    def check_model(self, model: ModelInfo) -> list[str]:
        """Refuse a model of another type, depth or width (ConfigError); return warnings about another
        name or revision."""
        return self.model.check(model, "this profile", "profile this model first")

    def layers_of(self, function: str, rule: str = "block") -> list[int]:
        """The layers of `function`: its flip block (`block`) or the papers' half-peak block (`paper`).
        Raises ConfigError if the function is unknown, not measurable or has no such layers."""
        if function not in self.functions:
            raise ConfigError(
                f"the profile has no function {function!r}", f"it has {', '.join(self.functions) or 'none'}"
            )
        found = self.functions[function]
        if found.status != "ok":
            raise ConfigError(
                f"{function} was not measurable: {found.pairs_answered} of {found.pairs} pairs answered",
                f"at least {MIN_ANSWERED_PAIRS} are needed: more or easier pairs, or give --layers yourself",
            )
        layers = found.flip_block if rule == "block" else found.layers
        if not layers:
            raise ConfigError(
                f"the profile found no layers for {function} by the rule {rule!r}",
                "try the other --layer-rule or give --layers yourself",
            )
        return list(layers)


def _function_profile(value: Mapping[str, Any]) -> FunctionProfile:
    known = {f.name for f in fields(FunctionProfile)}
    return FunctionProfile(**{k: v for k, v in value.items() if k in known})


def is_count(value: object) -> bool:
    """Whether `value` is a whole number from 0 on, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_shares(values: object) -> bool:
    """A list of finite numbers from 0 to 1."""
    if not isinstance(values, list):
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in values)


# --- scorecard.json ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionScore:
    """Accuracy in 0..1 with its Wilson interval; beside a base also the base's, the change in points with its
    interval (paired), and how many questions only the model (`gained`) or only the base (`lost`) gets right.
    `drop_from`: first dropped layer (as text) -> `accuracy`, `n`, `ci95` and `delta` (points against the
    untouched model) over the questions with an image; absent where nothing was dropped. `knockout`, `rerun`:
    `accuracy`, `n`, `ci95`, `delta` and `delta_ci95` (points against untouched, paired) with a layer left
    out or layers run twice, those layers, and of a rerun `controls`: other layers (as text) -> accuracy."""

    accuracy: float
    n: int
    ci95: list[float]
    base_accuracy: float | None = None
    delta: float | None = None
    delta_ci95: list[float] | None = None
    gained: int | None = None
    lost: int | None = None
    drop_from: dict[str, dict[str, Any]] | None = None
    knockout: dict[str, Any] | None = None
    rerun: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


def wilson(successes: float, n: float, z: float = 1.959963984540054) -> list[float]:
    """95 % Wilson score interval of a share; [0, 1] for n = 0. `n` may be an effective sample size."""
    if n <= 0:
        return [0.0, 1.0]
    p, z2 = successes / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return [max(0.0, center - half), min(1.0, center + half)]


# --- scores.parquet ----------------------------------------------------------------------------


def score_columns(functions: tuple[str, ...], by_layer: bool = False) -> list[str]:
    """Columns of `scores.parquet` in order; `by_layer`: with the losses without each single layer."""
    per_function = [f"{kind}_{f}" for f in functions for kind in ("loss", "delta")]
    head = ["uid", "row", "source", "n_answer_tokens", "loss_full"]
    tail = ["bucket", "score", "flags", "selected"]
    return [*head, *per_function, "visual_gain", *([BY_LAYER] if by_layer else []), *tail]
