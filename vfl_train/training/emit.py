"""`vfl-train plan`: the layer plan as settings of other trainers, ready to paste.

All name modules in full, so that what is trained is the plan and nothing else. How each trainer matches names
(imitated in tests/training/test_emit.py):

- PEFT (tuners_utils.py `check_target_module_exists`): a name equals an entry or ends with "." + entry.
- LLaMA-Factory (model/model_utils/visual.py `patch_target_modules`, at ff6d4d12): every module whose name
  contains an entry and no forbidden part, containers included; entries are split at commas. A frozen language
  model would forbid all of them.
- ms-swift (pipelines/train/tuner.py `get_target_modules`, at 3602360a): `--target_regex` goes to PEFT as a
  string, which must match the whole name. The adapter keeps the pattern; `vfl-train migrate` lists modules.
- axolotl (loaders/adapter.py `_build_peft_lora_config`, at 067b021c): the list goes to PEFT as it is;
  `lora_target_linear` would add every linear layer, those of the vision tower included.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from vfl_train.hub.load import load_profile
from vfl_train.hub.privacy import public_name
from vfl_train.options import format_layers
from vfl_train.training.plan import LayerPlan, build_plan, choose_layers, peft_arguments

if TYPE_CHECKING:
    from vfl_train.config import PlanConfig

RANK, ALPHA = 16, 32


def emit_plan(config: PlanConfig) -> None:
    """Print the settings that make another trainer train a profile's function layers.

    Raises:
        ConfigError: whatever `choose_layers` and `build_plan` refuse.
        HubError: the Hub cannot be reached.
    """
    from vfl_train.training.skeleton import load_skeleton

    profile = load_profile(config.profile)
    vlm = load_skeleton(config.model or profile.model.name_or_path, profile.model.revision)
    functions = config.functions or [
        name
        for name, f in profile.functions.items()
        if f.status == "ok" and (f.flip_block if config.layer_rule == "block" else f.layers)
    ]
    choice = choose_layers(vlm.info, profile=profile, functions=functions, layer_rule=config.layer_rule)
    print(SETTINGS[config.emit](build_plan(choice, vlm, lora_r=RANK)))


def peft(plan: LayerPlan) -> str:
    """Keyword arguments of `peft.LoraConfig`, as JSON."""
    return json.dumps(peft_arguments(plan, r=RANK, alpha=ALPHA, dropout=0.0), indent=2)


def llamafactory(plan: LayerPlan) -> str:
    """YAML keys for a training file of LLaMA-Factory."""
    return _commented(plan, {
        "model_name_or_path": public_name(plan.model.name_or_path),
        "finetuning_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA,
        "freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False,
        "lora_target": ",".join(plan.module_names),
    })  # fmt: skip


def swift(plan: LayerPlan) -> str:
    """Options of `swift sft`, for a shell."""
    return "\n".join((
        f"# {_title(plan)}",
        "swift sft \\",
        f"  --model {public_name(plan.model.name_or_path)} --use_hf true \\",
        f"  --tuner_type lora --lora_rank {RANK} --lora_alpha {ALPHA} \\",
        f"  --target_regex '{name_pattern(plan.module_names)}'",
    ))  # fmt: skip


def axolotl(plan: LayerPlan) -> str:
    """YAML keys for a configuration of axolotl."""
    return _commented(plan, {
        "base_model": public_name(plan.model.name_or_path), "adapter": "lora", "lora_r": RANK,
        "lora_alpha": ALPHA, "lora_target_linear": False, "lora_target_modules": list(plan.module_names),
    })  # fmt: skip


SETTINGS: dict[str, Callable[[LayerPlan], str]] = {
    "peft": peft, "llamafactory": llamafactory, "swift": swift, "axolotl": axolotl,
}  # fmt: skip


def name_pattern(names: Sequence[str]) -> str:
    """A regular expression for exactly these module names: layers with the same linears share one part.

    "a.layers.3.mlp.up_proj" and "a.layers.4.mlp.up_proj" give ^(a\\.layers\\.(3|4)\\.mlp\\.up_proj)$.
    """
    inside: defaultdict[tuple[str, str], list[str]] = defaultdict(list)  # (before, layer) -> the rest
    for name in names:
        match = re.match(r"(.*?\.)(\d+)\.(.*)", name)
        before, layer, rest = match.groups() if match else (name, "", "")
        inside[before, layer].append(rest)
    shared: defaultdict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (before, layer), rest in inside.items():
        shared[before, tuple(sorted(rest))].append(layer)
    parts = [_part(before, layers, rest) for (before, rest), layers in shared.items()]
    return f"^({'|'.join(parts)})$"


def _part(before: str, layers: Sequence[str], rest: Sequence[str]) -> str:
    if layers == [""]:
        return re.escape(before)
    return rf"{re.escape(before)}({'|'.join(layers)})\.({'|'.join(map(re.escape, rest))})"


def _title(plan: LayerPlan) -> str:
    what = ", ".join(f"{f}: {format_layers(layers)}" for f, layers in plan.functions.items())
    return f"decoder layers {format_layers(plan.layers)} of {plan.num_layers} ({what})"


def _commented(plan: LayerPlan, values: dict[str, Any]) -> str:
    text = yaml.safe_dump(values, sort_keys=False, width=2**20, allow_unicode=True)
    return f"# {_title(plan)}\n{text}".rstrip()
