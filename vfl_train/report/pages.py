"""HTML pages, self-contained: pictures are data URIs and every text from outside is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

from vfl_train import __version__
from vfl_train.report import tables
from vfl_train.report.curves import curves_bytes, drop_bytes
from vfl_train.report.heatmap import heatmap_bytes
from vfl_train.report.tables import control_rows, function_rows, percent
from vfl_train.schemas import FunctionProfile, Profile

if TYPE_CHECKING:
    from vfl_train.functions.probes import LoadedPair, ProbeSet

__all__ = [
    "control_rows", "data_uri", "function_rows", "page", "percent", "profile_page", "thumbnail", "tiles",
]  # fmt: skip

THUMBNAIL = 152  # pixels
LONGEST = 300  # characters of a question or an answer that an example shows


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("vfl_train.report", "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def page(template: str, title: str, lead: str, **values: Any) -> str:
    """Render one of the templates. Everything in `values` is escaped."""
    text = _templates().get_template(template).render(title=title, lead=lead, version=__version__, **values)
    return text.encode("utf-8", "replace").decode("utf-8")  # file names may hold what UTF-8 cannot


def data_uri(png: bytes) -> str:
    """PNG bytes as a URI that a page can hold, empty for none."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii") if png else ""


def thumbnail(image: Image.Image) -> str:
    """A small PNG of `image` as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return data_uri(buffer.getvalue())


def tiles(rows: Sequence[tuple[Image.Image | None, str, str, str]]) -> list[dict[str, str]]:
    """(image, question, answer, note) as what `tiles.html` shows."""
    return [
        {
            "image": "" if image is None else thumbnail(image),
            "question": q[:120],
            "answer": a[:120],
            "note": n,
        }
        for image, q, a, n in rows
    ]


def profile_page(profile: Profile, probes: ProbeSet, examples: int = 3) -> str:
    """The report of a profile with at most `examples` pairs a function. What a profile does not hold (an
    older one, or other interventions than swaps) has no section."""
    model = profile.model
    lead = (
        f"{model.model_type}, {model.num_layers} layers, {profile.intervention} of the image "
        f"({profile.path} path, {profile.dtype}), probe set {profile.probe_set.get('name', tables.NONE)}."
    )
    blocks = tables.interaction_rows(profile)
    return page(
        "profile.html", f"Vision function layers of {model.name_or_path}", lead,
        intervention=profile.intervention, phase=profile.phase, depth=model.num_layers,
        findings=tables.findings(profile), few=tables.not_measurable(profile),
        heatmap=data_uri(heatmap_bytes(profile)), curves=data_uri(curves_bytes(profile)),
        functions=function_rows(profile), controls=control_rows(profile),
        examples={n: _cards(f, probes.pairs.get(n, []), examples) for n, f in profile.functions.items()},
        drops=data_uri(drop_bytes(profile)), plan=tables.drop_rows(profile),
        blocks=blocks, blocks_summary=tables.interaction_summary(blocks), base=tables.base_rows(profile),
        cost=tables.cost_rows(profile), reasons=profile.cost.get("reasons", {}),
        repeat=tables.repeat_rows(profile),
    )  # fmt: skip


def _cards(f: FunctionProfile, pairs: Sequence[LoadedPair], most: int) -> list[dict[str, str]]:
    """Pairs with what the model said of image a, untouched and under the swap at the peak; where that was
    not recorded, the first pairs alone."""
    loaded = {p.line: p for p in pairs}
    said = [e for e in f.examples if e.get("pair") in loaded][:most]
    cards = [_card(p) for p in (loaded[e["pair"]] for e in said)] or [_card(p) for p in pairs[:most]]
    for card, e in zip(cards, said, strict=False):
        own, swapped = str(e.get("said", "")).strip(), str(e.get("said_swapped", "")).strip()
        card |= {"said": _cut(own), "swapped": _cut(swapped), "peak": str(f.peak_layer)}
        card["changed"] = "" if own == swapped else "changed"
    return cards


def _card(p: LoadedPair) -> dict[str, str]:
    return {
        "a": thumbnail(p.image_a), "b": thumbnail(p.image_b), "question": _cut(p.pair.question),
        "answer_a": _cut(p.pair.answer_a), "answer_b": _cut(p.pair.answer_b), "peak": "",
    }  # fmt: skip


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
