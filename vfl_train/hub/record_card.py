"""Cards (README.md) of what is published without weights: profiles and selections."""

from __future__ import annotations

from typing import Any

from vfl_train.hub.card import PICTURE, Published, front
from vfl_train.options import format_layers
from vfl_train.schemas import Profile

_TAGS = ["vision-function-layers", "vfl-train"]


def profile_card(profile: Profile, public: Published) -> str:
    """README.md of a profile repo. It names no base_model in its metadata: the Hub would list it among the
    models made of that one."""
    base, where = public.origin.name, public.where
    rows = "\n".join(
        f"| {name} | {f.pairs_answered} of {f.pairs} | {'-' if f.peak_layer is None else f.peak_layer} "
        f"| {format_layers(f.flip_block)} | {format_layers(f.layers)} |"
        for name, f in profile.functions.items()
    )
    usable = [name for name, f in profile.functions.items() if f.status == "ok"] or list(profile.functions)
    functions = ",".join(usable[:2])
    at = f" at commit `{public.origin.revision}`" if public.origin.revision else ""
    versions = ", ".join(f"{k} {v}" for k, v in profile.versions.items())
    picture = f"\n![Heat map: vision functions by decoder layer]({PICTURE})\n" if public.picture else ""
    probes = profile.probe_set
    return f"""{front({"tags": [*_TAGS, "profile"]})}
# Vision function layers of {base}

Which of the {profile.model.num_layers} decoder layers read what out of the image, measured on {base}{at} with
`vfl-train profile`. There are no weights here.
{picture}
| function | pairs answered | peak layer | flip block | half-peak layers |
|---|---|---|---|---|
{rows}

The flip block is the smallest run of layers whose swap, all together, turns the answer to the other image's.

## Use

```bash
vfl-train lora --model {base} --profile {where} \\
    --functions {functions} --data DATA --output adapter
```

## How it was measured

| | |
|---|---|
| intervention | {profile.intervention}, phase {profile.phase}, path {profile.path} |
| probe set | {probes.get("name")} (sha256 {str(probes.get("sha256"))[:12]}) |
| number format | {profile.dtype} |
| seed | {profile.seed} |
| versions | {versions} |

## Limits

It holds for this model, these probes and this prompt. A profile of another checkpoint of the same
architecture is only a guess: vfl-train warns where the name or commit differs.
"""


def selection_card(record: dict[str, Any], public: Published, with_rows: bool) -> str:
    """README.md of a dataset repo with the scores of a selection, and `with_rows` the picked rows."""
    rows_are = "in the file `selected.*`, without their images" if with_rows else "not here"
    data, budget = record["data"], record["budget"]
    rows = "\n".join(f"| {n} | {b['rows']} | {b['selected']} |" for n, b in record["buckets"].items())
    head = {
        "tags": [*_TAGS, "data-selection"],
        "configs": [{"config_name": "scores", "data_files": "scores.parquet"}],
    }
    return f"""{front(head)}
# {record["rows_selected"]} of {record["rows_kept"]} rows, selected for {", ".join(record["functions"])}

What `vfl-train select` says of every row of a training pool: how much harder its answer gets for
{public.origin.name} without the image at the layers of each vision function, and whether it was picked.

| bucket | rows | picked |
|---|---|---|
{rows}

`scores.parquet` has one line a row: `row` is its place in the pool (from 0), `uid` a hash of its content,
`loss_*` and `delta_*` are nats per answer token.

| | |
|---|---|
| method | {record["method"]}, ablation {record["ablation"]} |
| budget | {budget["asked"]} ({budget["rows"]} rows) |
| pool | {data["format"]}, {data["rows_read"]} rows (sha256 {data["sha256"][:12]}) |
| seed | {record["seed"]} |

## Limits

The rows themselves are {rows_are}; scores hold for this model and its profile.
"""
