"""Which layers and modules of a model are trained: the layer plan.

A plan comes from a profile (the function layers) or from explicit layers, and names every adapted
module in full, so that nothing is left to a pattern. `plan.json` is its file form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from vfl_train import options
from vfl_train.errors import ConfigError
from vfl_train.schemas import ModelInfo, Profile
from vfl_train.training.controls import apply_control

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel
    from vfl_train.models.parts import Parts

PLAN_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerChoice:
    """Chosen decoder layers (0-based, sorted) and where they come from. `functions` maps each function to
    its layers (empty for explicit layers), `warnings` are the profile's remarks on the model."""

    layers: tuple[int, ...]
    functions: dict[str, list[int]]
    layer_rule: str | None
    control: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """What is trained. `module_names` are full names in the base model; `skipped` says, group by group,
    which linear modules are not adapted and why; `trainable_parameters` counts LoRA's A and B;
    `part_modules` counts the adapted modules of parts beside the decoder (`connector`, `vision`)."""

    model: ModelInfo
    layers: tuple[int, ...]
    functions: dict[str, list[int]]
    layer_rule: str | None
    control: str | None
    module_names: tuple[str, ...]
    skipped: tuple[dict[str, Any], ...]
    trainable_parameters: int
    part_modules: dict[str, int] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Depth of the decoder."""
        return self.model.num_layers

    @property
    def also_adapts(self) -> tuple[str, ...]:
        """Parts beside the decoder that are adapted."""
        return tuple(self.part_modules)

    @property
    def lowest_layer(self) -> int:
        """The lowest decoder layer that backward visits: the lowest adapted one, or 0 where a part below the
        decoder is adapted too."""
        return 0 if self.also_adapts else self.layers[0]

    def to_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        return {"schema_version": PLAN_SCHEMA_VERSION, **asdict(self)}


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layers of "20-23,25": 0-based, ranges inclusive, sorted, without repeats.

    Raises:
        ConfigError: nothing named, not a layer or rising range, or an index outside 0..num_layers-1 (named
            together with the depth).
    """
    layers = options.parse_layers(text)
    if layers[-1] >= num_layers:
        raise ConfigError(
            f"--layers: layer {layers[-1]} does not exist, the decoder has {num_layers} layers",
            f"layers are 0-based: 0-{num_layers - 1}",
        )
    return layers


def choose_layers(
    model: ModelInfo,
    *,
    profile: Profile | None = None,
    functions: Sequence[str] = (),
    layers: str | None = None,
    layer_rule: str = "block",
    control: str | None = None,
    seed: int = 0,
) -> LayerChoice:
    """The layers to train: those of `functions` in `profile`, or `layers`; then replaced by a control set.

    Raises:
        ConfigError: neither or both given, an unknown or not measurable function, a profile of another
            kind of model, an index out of range, or a control that is not defined at this size.
    """
    if layers is not None and functions:
        raise ConfigError("both --layers and --functions are given", "give one of them")
    if control == "all" and layers is None and (profile is None or not functions):
        return LayerChoice(tuple(range(model.num_layers)), {}, None, control)
    if layers is not None:
        choice = LayerChoice(parse_layers(layers, model.num_layers), {}, None)
    else:
        choice = _choose_from_profile(model, profile, functions, layer_rule)
    if control is None:
        return choice
    replaced = apply_control(choice.layers, model.num_layers, control, seed)
    return LayerChoice(replaced, choice.functions, choice.layer_rule, control, choice.warnings)


def _choose_from_profile(
    model: ModelInfo, profile: Profile | None, functions: Sequence[str], rule: str
) -> LayerChoice:
    if profile is None:
        raise ConfigError(
            "no layers to train are named", "give --profile with --functions, or --layers such as 20-23"
        )
    if not functions:
        usable = [name for name, f in profile.functions.items() if f.status == "ok"]
        raise ConfigError("no function is named", f"give --functions, e.g. {','.join(usable[:2]) or 'ocr'}")
    warnings = profile.check_model(model)
    by_function = {name: sorted(profile.layers_of(name, rule)) for name in functions}
    layers = sorted({layer for found in by_function.values() for layer in found})
    return LayerChoice(tuple(layers), by_function, rule, None, tuple(warnings))


def build_plan(
    choice: LayerChoice, vlm: VisionLanguageModel, lora_r: int, also_adapt: Sequence[str] = ()
) -> LayerPlan:
    """The plan of `choice` on a loaded model (weights are not read: meta tensors will do), with the linear
    modules of the parts `also_adapt` (see `vfl_train.models.parts`).

    Raises:
        ConfigError: a planned layer or part has no linear module that LoRA may adapt, or one is missing.
    """
    from vfl_train.models.parts import PARTS, Parts

    modules = dict(vlm.model.named_modules())
    beside = Parts(vlm)
    names: list[str] = []
    for layer in choice.layers:
        found = list(vlm.linear_names(layer))
        if not found or any(name not in modules for name in found):
            raise ConfigError(f"layer {layer} of {vlm.model_type} has no linear modules that LoRA can adapt")
        names += found
    part_names = {part: beside.linears(part) for part in PARTS if part in also_adapt}
    names += [name for found in part_names.values() for name in found]
    parameters = sum(lora_r * (modules[n].in_features + modules[n].out_features) for n in names)
    return LayerPlan(
        model=vlm.info,
        layers=choice.layers,
        functions=choice.functions,
        layer_rule=choice.layer_rule,
        control=choice.control,
        module_names=tuple(names),
        skipped=tuple(_skipped(vlm, beside, set(names), choice.layers)),
        trainable_parameters=parameters,
        part_modules={part: len(found) for part, found in part_names.items()},
    )


def _skipped(
    vlm: VisionLanguageModel, beside: Parts, planned: set[str], layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Linear modules outside the plan, by group: {"name", "linears", "reason"}."""
    from torch import nn

    prefixes = {f"{name}.": index for index, name in enumerate(vlm.layer_names)}
    head = vlm.model.get_output_embeddings()
    groups: dict[tuple[str, str], int] = {}
    for name, module in beside.modules.items():
        if not isinstance(module, nn.Linear) or name in planned:
            continue
        layer = next((index for prefix, index in prefixes.items() if name.startswith(prefix)), None)
        if layer is None:
            key = (name, "output head") if module is head else _outside(beside, name)
        elif layer in layers:
            key = (vlm.layer_names[layer], "experts or routers: of these layers only attention is adapted")
        else:
            key = (vlm.layer_names[layer], "layer outside the plan")
        groups[key] = groups.get(key, 0) + 1
    return [{"name": name, "linears": count, "reason": reason} for (name, reason), count in groups.items()]


def _outside(beside: Parts, name: str) -> tuple[str, str]:
    """(group, reason) of a linear module that is neither in a decoder layer nor the output head."""
    group, part = ".".join(name.split(".")[:2]), beside.of(name)
    if part == "vision":
        return group, "vision tower: adapted with --also-adapt vision only, as far as its output is used"
    if part == "connector":
        return group, "connector: adapted with --also-adapt connector only"
    return group, "outside the decoder layers: never adapted"


def peft_arguments(plan: LayerPlan, *, r: int, alpha: int, dropout: float) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig`: an explicit list of full module names, no pattern."""
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(plan.module_names),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
