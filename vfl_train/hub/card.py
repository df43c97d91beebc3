"""Model cards (README.md) of adapters and merged models, with the metadata the Hub reads."""

from __future__ import annotations

from typing import Any

import yaml

from vfl_train.hub.privacy import public_name
from vfl_train.options import format_layers
from vfl_train.training.plan import LayerPlan

_TAGS = ["lora", "sft", "trl", "vision-function-layers", "vfl-train"]
_LICENCE = (
    "The licence of the base model applies to this one too; set `license` in the metadata above accordingly."
)


def _front_matter(values: dict[str, Any]) -> str:
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "---\n"


def _layer_map(layers: tuple[int, ...], depth: int) -> str:
    """One character a decoder layer: `#` trained, `.` not."""
    return "".join("#" if layer in layers else "." for layer in range(depth))


def adapter_card(plan: LayerPlan, training: dict[str, Any], r: int, alpha: int) -> str:
    """README.md of an adapter. `training` holds what the table of the run shows."""
    base = public_name(plan.model.name_or_path)
    head = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": _TAGS,
    }
    if plan.functions:
        what = "the layers of " + ", ".join(f"`{f}` ({format_layers(v)})" for f, v in plan.functions.items())
    else:
        what = "the decoder layers named below"
    if plan.control:
        what = f"a control set of layers (`{plan.control}`), not the function layers"
    rows = "\n".join(f"| {key} | {value} |" for key, value in training.items())
    return f"""{_front_matter(head)}
# LoRA on decoder layers {format_layers(plan.layers)} of {base}

LoRA (rank {r}, alpha {alpha}) on {what}; everything else, the vision tower and connector included, is as in
the base model. {plan.trainable_parameters:,} parameters.

    layer 0 {_layer_map(plan.layers, plan.num_layers)} layer {plan.num_layers - 1}

`plan.json` names every adapted module and what was left out; `manifest.json` holds the sha256 of each file.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

`vllm serve {base} --enable-lora --max-lora-rank {max(r, 8)} --lora-modules vfl=THIS_FOLDER` serves it.

## Training

| | |
|---|---|
{rows}

Loss on the answers only; settings in `train_config.yaml`, course in `train_log.jsonl`.

## Limits

Trained on one data set with one seed. What it gained, and what it forgot, is not said here: measure it with
`vfl-train eval`. {_LICENCE}
"""


def merged_card(base: str | None, adapters: list[dict[str, Any]], difference: float, dtype: str) -> str:
    """README.md of a merged model."""
    head = {
        "base_model": base,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [*_TAGS, "merge"],
    }
    rows = "\n".join(f"| {a['name']} | {format_layers(a['layers'])} | {a['r']} |" for a in adapters)
    return f"""{_front_matter(head)}
# {base} with {len(adapters)} LoRA adapter{"s" if len(adapters) > 1 else ""} merged in

A plain transformers model in {dtype}. The adapters were added to the weights of the base model:

| adapter | decoder layers | rank |
|---|---|---|
{rows}

Largest difference between the logits of the merged model and those of the base with the adapters on it:
{difference:.2e} of the largest logit. Adapters on different layers add up exactly as weights, but a later
layer sees what an earlier one changed: evaluate the merged model, not only its parts.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

{_LICENCE}
"""


def knockout_card(base: str | None, layer: int, projections: list[str], dtype: str) -> str:
    """README.md of a model with a layer's projections out zeroed."""
    head = {
        "base_model": base,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vision-function-layers", "vfl-train", "knockout"],
    }
    zeroed = " and ".join(f"`{name}`" for name in projections)
    return f"""{_front_matter(head)}
# {base} without {zeroed} of layer {layer}

A plain transformers model in {dtype}: the weights of the base model, with {zeroed} of decoder layer
{layer} zero (weight and bias), so that it adds nothing to the residual stream. `vfl-train knockout` chose
the layer for one task; what it does to others is not said here: measure it with `vfl-train eval`.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

{_LICENCE}
"""
