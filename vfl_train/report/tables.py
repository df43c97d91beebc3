"""What the report of a profile says in words and tables: plain texts, escaped by the templates."""

from __future__ import annotations

import math
import shlex
from functools import partial
from typing import Any

from vfl_train.options import format_layers
from vfl_train.schemas import (
    BUILTIN_FUNCTIONS,
    MIN_ANSWERED_PAIRS,
    PROFILE_CONTROLS,
    FunctionProfile,
    Profile,
    wilson,
)

NONE = "-"
OVERLAP = "overlap"


def percent(share: float) -> str:
    """0.873 -> "87.3 %"."""
    return f"{100 * share:.1f} %"


def layers_text(layers: list[int]) -> str:
    """[21, 22, 23] -> "layers 21-23"."""
    return ("layer " if len(layers) == 1 else "layers ") + format_layers(layers)


# --- what was found ------------------------------------------------------------------------------


def findings(profile: Profile) -> list[tuple[str, str, str, str]]:
    """What was found of each function as a sentence in four parts: the function, the words up to the layers,
    the layers ("layers 21-23", empty if there are none), the rest."""
    measured = {n: f for n, f in profile.functions.items() if f.status == "ok"}
    said = _read_in if profile.intervention == "swap" else partial(_needed, profile.intervention)
    return [(name, *said(f)) for name, f in measured.items()]


def _read_in(f: FunctionProfile) -> tuple[str, str, str]:
    """A sentence on the flip block."""
    if not f.flip_block:
        return "was not found: no swap, even at all layers, turns an answer into the other image's.", "", ""
    verb = "is spread over" if f.distributed else "is read in"
    rest = ", more than a quarter of the depth" if f.distributed else ""
    share = f.details.get("block")
    if share is not None:
        there = "this layer alone reads" if len(f.flip_block) == 1 else "these layers alone read"
        rest += f": when {there} the other image, {100 * share:.0f} % of the answers become that image's"
    return f"{verb} ", layers_text(f.flip_block), f"{rest}."


def _needed(intervention: str, f: FunctionProfile) -> tuple[str, str, str]:
    """A sentence on the peak of a drop."""
    if f.peak_layer is None:
        return "does not depend on the image at any one layer: no drop changes an answer.", "", ""
    k, rate = f.peak_layer, f.change_rate[f.peak_layer]
    if intervention == "drop":
        rest = f": without the image there, {100 * rate:.0f} % of the answers change."
        return "depends most on ", layers_text([k]), rest
    step = rate - (f.change_rate[k + 1] if k + 1 < len(f.change_rate) else 0.0)
    points = f"{100 * step:.0f} points more than from the next layer on"
    rest = f": dropping the image from there on changes {points}."
    return "loses most at ", layers_text([k]), rest


def not_measurable(profile: Profile) -> str:
    """One sentence on the functions of which nothing was concluded, empty without any."""
    few = [
        f"{n} ({f.pairs_answered} of {f.pairs} pairs answered)"
        for n, f in profile.functions.items()
        if f.status != "ok"
    ]
    return f"Not measurable: {', '.join(few)}; {MIN_ANSWERED_PAIRS} answered pairs are needed." if few else ""


def function_rows(profile: Profile) -> list[dict[str, str]]:
    """The table of a profile, one row a function."""
    return [_function_row(name, f) for name, f in profile.functions.items()]


def _function_row(name: str, f: FunctionProfile) -> dict[str, str]:
    row = dict.fromkeys(("peak", "changed", "flipped", "joint"), NONE)
    row |= {"name": name, "answered": f"{f.pairs_answered}/{f.pairs}"}
    row |= {"layers": format_layers(f.layers), "block": format_layers(f.flip_block)}
    row["spread"] = NONE if f.status != "ok" else "yes" if f.distributed else "no"
    if f.peak_layer is not None:
        low, high = f.ci95[f.peak_layer]
        row["peak"] = str(f.peak_layer)
        row["changed"] = f"{percent(f.change_rate[f.peak_layer])} ({100 * low:.0f}-{100 * high:.0f})"
        row["flipped"] = percent(f.flip_rate[f.peak_layer]) if f.flip_rate else NONE
    if "block" in f.details:
        row["joint"] = f"{percent(f.details['block'])} (of {percent(f.details['all_layers'])})"
    if f.status != "ok":
        row["name"] += f" ({f.status.replace('_', ' ')})"
    return row


def control_rows(profile: Profile) -> list[dict[str, str]]:
    """Per function with controls the largest change rate of each at any layer. `repeat`: of the untouched
    model asked again."""
    return [
        {"name": name, "repeat": _share(f.details.get("base_changed"))}
        | {kind: _share(max(f.controls.get(kind) or [], default=None)) for kind in PROFILE_CONTROLS}
        for name, f in profile.functions.items()
        if any(f.controls.values())
    ]


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


# --- drops and blocks ----------------------------------------------------------------------------


def drop_rows(profile: Profile) -> list[dict[str, str]]:
    """The drop plan: from which layer on the image is not needed for a function."""
    depth = profile.model.num_layers
    rows = []
    for name, plan in profile.drop_plan.items():
        k = plan["from_layer"]
        curve = profile.drop_curve.get(name)
        rows.append(
            {
                "name": name,
                "needed": format_layers(range(k)),
                "free": format_layers(range(k, depth)),
                "saved": f"{depth - k} of {depth}",
                "lost": f"{plan['points_lost']:.1f}",
                "allowed": f"{plan['allowed_points']:g}",
                "n": NONE if curve is None else str(curve["n"]),
            }
        )
    return rows


def interaction_rows(profile: Profile) -> list[dict[str, Any]]:
    """Per function f a row of cells, one for each function g: what g's block changes of f's answers, both
    blocks together, the capped sum, and whether they agree."""
    names = list(profile.interaction)
    blocks = {n: set(profile.functions[n].flip_block) for n in names}
    return [
        {
            "name": f,
            "cells": [_cell(profile.interaction[f].get(g), bool(blocks[f] & blocks[g])) for g in names],
        }
        for f in names
    ]


def _cell(rates: dict[str, float] | None, overlap: bool) -> dict[str, str]:
    if rates is None:
        return dict.fromkeys(("other", "both", "sum", "verdict"), "")
    expected = min(1.0, rates["own"] + rates["other"])
    return {
        "other": f"{100 * rates['other']:.0f}", "both": f"{100 * rates['both']:.0f}",
        "sum": f"{100 * expected:.0f}", "verdict": OVERLAP if overlap else _verdict(rates, expected),
    }  # fmt: skip


def _verdict(rates: dict[str, float], expected: float) -> str:
    """Whether both blocks change "less" or "more" than the sum, empty if that is within the 95 % interval of
    the difference: the arms of the Wilson intervals added in squares (Newcombe 1998, Statistics in Medicine
    17:873), each with as many observations as pairs."""
    pairs = rates.get("pairs", MIN_ANSWERED_PAIRS)
    down, up = {}, {}
    for key in ("own", "other", "both"):
        low, high = wilson(rates[key] * pairs, pairs)
        down[key], up[key] = rates[key] - low, high - rates[key]
    difference = expected - rates["both"]
    if difference > math.hypot(down["own"], down["other"], up["both"]):
        return "less"
    return "more" if -difference > math.hypot(up["own"], up["other"], down["both"]) else ""


def interaction_summary(rows: list[dict[str, Any]]) -> str:
    """How many of the combinations add up, and of how many that cannot be said."""
    cells = [c for row in rows for c in row["cells"] if c["sum"]]
    apart = [c for c in cells if c["verdict"] != OVERLAP]
    alike = sum(1 for c in apart if not c["verdict"])
    capped = sum(1 for c in apart if c["sum"] == "100")
    said = []
    if apart:
        said.append(
            f"{alike} of {len(apart)} combinations add up within the 95 % interval of the difference; one in "
            "twenty may miss it by chance."
        )
    if capped:
        said.append(f"In {capped} the sum reaches 100 %: there a larger effect could not show.")
    if len(apart) < len(cells):
        said.append(
            f"{len(cells) - len(apart)} combinations are not judged: their blocks have layers in common."
        )
    return " ".join(said)


# --- against the base, cost, repetition ----------------------------------------------------------


def base_rows(profile: Profile) -> list[dict[str, str]]:
    """Peak and block of the base beside those measured now."""
    rows = []
    for name, base in profile.compared_with.items():
        f, change = profile.functions.get(name), base.get("largest_change")
        if f is None:
            continue
        before, now = base["flip_block"], f.flip_block
        rows.append(
            {
                "name": name, "peak_before": _layer(base["peak_layer"]), "peak_now": _layer(f.peak_layer),
                "before": format_layers(before), "now": format_layers(now),
                "change": NONE if change is None else f"{100 * change:.1f}",
                "moved": "no" if before == now else "yes",
            }
        )  # fmt: skip
    return rows


def _layer(layer: int | None) -> str:
    return NONE if layer is None else str(layer)


def cost_rows(profile: Profile) -> list[dict[str, str]]:
    """What the profile took, a row a function and one for all."""
    counted = {n: f.details["cost"] for n, f in profile.functions.items() if "cost" in f.details}
    return [_cost_row(name, cost) for name, cost in [*counted.items(), ("all", profile.cost)] if cost]


def _cost_row(name: str, cost: dict[str, Any]) -> dict[str, str]:
    sweep = cost.get("sweep_forwards")
    return {
        "name": name, "rows": f"{cost['rows']:,}", "forwards": f"{cost['plain_forwards']:.1f}",
        "sweep": NONE if sweep is None else f"{sweep:.1f}", "seconds": f"{cost['seconds']:.1f}",
        "reference": f"{cost['reference_rows']:,}",
    }  # fmt: skip


def repeat_rows(profile: Profile) -> list[tuple[str, str]]:
    """What is needed to repeat the profile."""
    m, probes = profile.model, profile.probe_set
    kind = f"{m.model_type}, {m.num_layers} decoder layers, width {m.hidden_size}"
    what = {"text": "all text after the image", "decode": "the answer's tokens only"}
    settings = {k.replace("_", " "): v for k, v in profile.settings.items() if v is not None}
    rows = [
        ("model", m.name_or_path), ("revision", m.revision or "none given"), ("architecture", kind),
        ("intervention", f"{profile.intervention}, on {what[profile.phase]}"),
        ("computed by", f"{profile.path} path, {profile.dtype}"), ("seed", str(profile.seed)),
        ("probe set", f"{probes.get('name', NONE)}, sha256 {probes.get('sha256', NONE)}"),
        ("settings", ", ".join(f"{k} {v}" for k, v in settings.items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in profile.versions.items())),
        ("command", command(profile)),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def command(profile: Profile) -> str:
    """The command that repeats the profile. An adapter's and a probe folder's place is not in the file."""
    m, settings = profile.model, profile.settings
    options: dict[str, Any] = {
        "model": m.name_or_path, "revision": m.revision, "adapter": settings.get("adapter"),
        "functions": None if set(profile.functions) == {*BUILTIN_FUNCTIONS} else ",".join(profile.functions),
        "probes": profile.probe_set.get("name") if settings.get("own_probes") else None,
        "pairs": settings.get("pairs"), "control-pairs": settings.get("control_pairs"),
        "max-pixels": settings.get("max_pixels"), "batch-tokens": settings.get("batch_tokens"),
        "intervention": profile.intervention, "phase": profile.phase, "path": profile.path,
        "drop-points": settings.get("drop_points"), "dtype": profile.dtype, "seed": profile.seed,
        "output": "profile",
    }  # fmt: skip
    given = [f"--{k} {shlex.quote(str(v))}" for k, v in options.items() if v is not None]
    return " ".join(["vfl-train profile", *given])
