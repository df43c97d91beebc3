"""What a profile cost, in the unit that users know: plain forwards.

One plain forward of a set of prompts is their tokens (each prompt with the model's own output) times the
decoder layers but the last. The last layer is left out on both sides: read-outs compute it for answer
positions only and count it apart. Not counted: the vision tower and the generation of base outputs, which
every method needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from vfl_train.interventions.readout import Cost


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of `costs`."""
    summed = Cost()
    for cost in costs:
        summed.add(cost)
    return summed


def record(cost: Cost, plain: float, seconds: float) -> dict[str, Any]:
    """`cost` as it stands in profile.json. `plain`: token-layers of one plain forward of the answered
    prompts; `plain_forwards` is how many of those the profile took (0 where no pair was answered)."""
    return {
        **vars(cost), "reasons": dict(cost.reasons), "seconds": round(seconds, 3),
        "plain_forwards": cost.token_layers / plain if plain else 0.0,
    }  # fmt: skip


def from_record(value: dict[str, Any]) -> Cost:
    """The `Cost` in a record."""
    known = {f.name: value[f.name] for f in fields(Cost)}
    return Cost(**{**known, "reasons": Counter(known["reasons"])})


def path_taken(path: str, cost: dict[str, Any]) -> str:
    """`reference` if every row ran there, else `engine`."""
    all_there = cost["rows"] > 0 and cost["reference_rows"] == cost["rows"]
    return "reference" if path == "reference" or all_there else "engine"


def path_record(path: str, cost: Cost) -> dict[str, Any]:
    """How rows were computed: the path asked for, and those that took the reference path all the same."""
    return {
        "path": path, "rows": cost.rows, "reference_rows": cost.reference_rows, "reasons": dict(cost.reasons)
    }  # fmt: skip


def reference_line(cost: dict[str, Any]) -> str:
    """One line on the rows that the engine left to the reference path, empty if there were none."""
    if not cost["reference_rows"]:
        return ""
    reasons = "; ".join(f"{reason} ({n})" for reason, n in sorted(cost["reasons"].items()))
    return f"{cost['reference_rows']} of {cost['rows']} rows ran on the reference path: {reasons}"
