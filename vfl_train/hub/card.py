"""Model cards (README.md) of adapters and merged models, with the metadata the Hub reads.

A card is written twice: by the command that makes the folder, for this machine, and again by `export` with
what is known then (`Published`): the Hub id of the base, the repo, the scorecard, the picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from vfl_train.hub.origin import Origin, dataset_id, local_origin
from vfl_train.hub.scorecard_card import Scorecard, model_index, results_section
from vfl_train.hub.targets import HERE, VLLM_RANKS, Serving, adapter_commands
from vfl_train.options import format_layers
from vfl_train.training.plan import LayerPlan

_TAGS = ["lora", "sft", "trl", "vision-function-layers", "vfl-train"]
PICTURE = "profile.png"


@dataclass(frozen=True)
class Published:
    """What is known when a folder is exported and not before. `repo` is where it will be; `datasets` are Hub
    ids of the training data; `picture`: the profile's heat map lies beside the card."""

    origin: Origin
    repo: str | None = None
    scorecard: Scorecard | None = None
    datasets: Sequence[str] = field(default=())
    picture: bool = False

    @property
    def where(self) -> str:
        """What the snippets load."""
        return self.repo or HERE


def unpublished(base: str | None, revision: str | None = None, datasets: Sequence[str] = ()) -> Published:
    """For the card of a folder that stays on this machine. `datasets`: the training data as the user named
    them; those that are no data sets of the Hub are left out."""
    known = tuple(found for name in datasets if (found := dataset_id(name)))
    return Published(local_origin(base, revision), datasets=known)


def front(values: dict[str, Any]) -> str:
    """A card's metadata block, without the keys that have nothing to say."""
    kept = {key: value for key, value in values.items() if value not in (None, [], {})}
    return "---\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) + "---\n"


def _metadata(public: Published, relation: str, library: str, tags: list[str]) -> dict[str, Any]:
    name = (public.repo or "").partition("/")[2] or "this model"
    return {
        # None for the bundled model and for a folder: on the Hub such a name would be a stranger's.
        "base_model": public.origin.model_id,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        **public.origin.licence,
        "datasets": list(public.datasets),
        "tags": tags,
        "model-index": model_index(public.scorecard, name) if public.scorecard else None,
    }


def _layer_map(layers: Sequence[int], depth: int) -> str:
    """One character a decoder layer: `#` trained, `.` not."""
    return "".join("#" if layer in layers else "." for layer in range(depth))


def _picture(public: Published) -> str:
    if not public.picture:
        return ""
    return f"""
![Heat map: vision functions by decoder layer]({PICTURE})

Share of answers that change when the image is swapped or dropped at one layer: the profile that the layers
come from (`profile.json`).
"""


def _results(public: Published) -> str:
    return f"\n## Results\n\n{results_section(public.scorecard)}" if public.scorecard else ""


def _base_line(origin: Origin) -> str:
    if origin.bundled:
        return (
            f"\nThe base is `{origin.name}`, the calibration model that comes with vfl-train "
            f'(`vfl_train.models.resolve_name("{origin.name}")` says where its folder lies).\n'
        )
    return f"\nThe base is {origin.name} at commit `{origin.revision}`.\n" if origin.revision else ""


def _unmeasured(public: Published, what: str) -> str:
    if public.scorecard:
        return "The results above are of these functions and questions only."
    return f"{what} is not said here: measure it with `vfl-train eval`."


def _use_adapter(public: Published) -> str:
    origin, where = public.origin, public.where
    base, more = f'"{origin.name}"', ""
    if origin.revision:
        base = f'\n    {base}, revision="{origin.revision}"\n'
    if origin.bundled:
        base, more = f'resolve_name("{origin.name}")[0]', "from vfl_train.models import resolve_name\n"
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
{more}
model = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(model, "{where}")
processor = AutoProcessor.from_pretrained("{where}")
```
"""


def _serve_adapter(public: Published, r: int, beside: bool) -> str:
    """Commands that serve an adapter, where one can be served (`beside`: LoRA is beside the decoder too); no
    server has the bundled model."""
    origin = public.origin
    if origin.bundled or r > VLLM_RANKS[-1]:
        return ""
    serving = Serving(origin.name, origin.revision, r, beside)
    vllm, sglang = (_wrapped(adapter_commands(t, serving), public.where) for t in ("vllm", "sglang"))
    text = f"""
vLLM serves it beside its base, under the name `vfl`:

```bash
{vllm}
```
"""
    if beside:  # SGLang applies no LoRA there
        return text
    return f"""{text}
So does SGLang, where it knows LoRA for this kind of model:

```bash
{sglang}
```
"""


def _wrapped(command: str, where: str) -> str:
    """A command that serves an adapter on several lines, of the adapter at `where`."""
    for option in ("--revision", "--enable-lora"):
        command = command.replace(f" {option}", f" \\\n    {option}")
    return command.replace(HERE, where)


def adapter_card(
    plan: LayerPlan, training: dict[str, Any] | str, r: int, alpha: int, public: Published | None = None
) -> str:
    """README.md of an adapter. `training` holds what the table of the run shows, or is that table."""
    public = public or unpublished(plan.model.name_or_path, plan.model.revision)
    base = public.origin.name
    beside = " and ".join({"vision": "vision tower"}.get(part, part) for part in plan.also_adapts)
    rest = "the vision tower and connector included, " if not beside else ""
    if plan.functions:
        what = "the layers of " + ", ".join(f"`{f}` ({format_layers(v)})" for f, v in plan.functions.items())
    else:
        what = "the decoder layers named below"
    if plan.control:
        what = f"a control set of layers (`{plan.control}`), not the function layers"
    rows = training if isinstance(training, str) else "\n".join(f"| {k} | {v} |" for k, v in training.items())
    return f"""{front(_metadata(public, "adapter", "peft", _TAGS))}
# LoRA on decoder layers {format_layers(plan.layers)} of {base}

LoRA (rank {r}, alpha {alpha}) on {what}{f", and on the {beside}" if beside else ""}; everything else,
{rest}is as in the base model. {plan.trainable_parameters:,} parameters.

    layer 0 {_layer_map(plan.layers, plan.num_layers)} layer {plan.num_layers - 1}

`plan.json` names every adapted module and what was left out; `manifest.json` holds the sha256 of each file.
{_base_line(public.origin)}{_picture(public)}{_results(public)}
## Use

{_use_adapter(public)}{_serve_adapter(public, r, bool(beside))}
## Training

| | |
|---|---|
{rows}

Loss on the answers only; settings in `train_config.yaml`.

## Limits

Trained on one data set with one seed. {_unmeasured(public, "What it gained, and what it forgot,")}

## Licence

{public.origin.licence_sentence}
"""


def renamed_card(config: dict[str, Any], public: Published) -> str:
    """README.md of an adapter that was not trained here but taken in by `vfl-train migrate`; `config` is its
    adapter_config.json."""
    base = public.origin.name
    return f"""{front(_metadata(public, "adapter", "peft", ["lora", "vfl-train"]))}
# LoRA adapter of {base}

LoRA (rank {config["r"]}, alpha {config["lora_alpha"]}) on {len(config["target_modules"])} modules, under the
names that `migration.json` states. What it was trained on is not known here.
{_base_line(public.origin)}{_results(public)}
## Use

{_use_adapter(public)}
## Limits

{_unmeasured(public, "What it gained, and what it forgot,")}

## Licence

{public.origin.licence_sentence}
"""


_PLAIN_USE = """## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{where}")
processor = AutoProcessor.from_pretrained("{where}")
```

```bash
vllm serve {where}
python -m sglang.launch_server --model-path {where}
```
"""


def merged_card(
    adapters: list[dict[str, Any]],
    difference: float,
    dtype: str,
    public: Published,
    score: dict[str, Any] | None = None,
) -> str:
    """README.md of a merged model. `score`: what merge.json says of base, single adapters and the merge."""
    exact = "in the same number format" if dtype == "float32" else "in float32"
    rows = "\n".join(f"| {a['name']} | {format_layers(a['layers'])} | {a['r']} |" for a in adapters)
    return f"""{front(_metadata(public, "finetune", "transformers", [*_TAGS, "merge"]))}
# {public.origin.name} with {len(adapters)} LoRA adapter{"s" if len(adapters) > 1 else ""} merged in

A plain transformers model in {dtype}. The adapters were added to the weights of the base model:

| adapter | decoder layers | rank |
|---|---|---|
{rows}
{_base_line(public.origin)}{_picture(public)}{_results(public)}{_merge_score(score)}
{_PLAIN_USE.format(where=public.where)}
## Limits

Largest difference between the logits of the merged model and those of the base with the adapters on it
{exact}: {difference:.2e} of the largest logit. Adapters on different layers add up exactly as weights,
but a later layer sees what an earlier one changed. {_merge_limits(public, score)}

## Licence

{public.origin.licence_sentence}
"""


def _merge_limits(public: Published, score: dict[str, Any] | None) -> str:
    if score is None or public.scorecard:
        return _unmeasured(public, "What the whole gained, and what it forgot,")
    return "The table above is a first look, of few questions: `vfl-train eval` asks more."


def _merge_score(score: dict[str, Any] | None) -> str:
    """The table of base, each adapter alone and the merge; empty where nothing was measured."""
    if score is None:
        return ""
    alone = list(next(iter(score["functions"].values()))["alone"])
    rows = [["function", "n", "base", *alone, "merged", "change, points"]]
    rows.append(["---"] * len(rows[0]))
    for name, s in score["functions"].items():
        shares = [s["base"], *(s["alone"][a] for a in alone), s["merged"]]
        rows.append([name, str(s["n"]), *(f"{share:.1%}" for share in shares), f"{s['change']:+.1f}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""
## The merge, scored

Share of right answers to {score["questions"]}; the change is against the best of base and single adapters.

{table}
"""


def knockout_card(layer: int, projections: list[str], dtype: str, public: Published) -> str:
    """README.md of a model with a layer's projections out zeroed."""
    zeroed = " and ".join(f"`{name}`" for name in projections)
    tags = ["vision-function-layers", "vfl-train", "knockout"]
    return f"""{front(_metadata(public, "finetune", "transformers", tags))}
# {public.origin.name} without {zeroed} of layer {layer}

A plain transformers model in {dtype}: the weights of the base model, with {zeroed} of decoder layer
{layer} zero (weight and bias), so that it adds nothing to the residual stream.
{_base_line(public.origin)}{_results(public)}
{_PLAIN_USE.format(where=public.where)}
## Limits

`vfl-train knockout` chose the layer for one task; {_unmeasured(public, "what it does to others")}

## Licence

{public.origin.licence_sentence}
"""


def table_of(card: str) -> str:
    """The rows of the training table of an adapter's card, empty without one."""
    match = re.search(r"^## Training\n\n\| \| \|\n\|---\|---\|\n((?:\|.*\n)*)", card, re.MULTILINE)
    return match[1].rstrip("\n") if match else ""
